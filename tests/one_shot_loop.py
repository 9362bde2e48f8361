"""The training loop of a one-shot search, for tests."""

from torch.nn import functional


def loop(model, search, batches, steps, optimizer=None):
    for step in range(steps):
        inputs, labels = batches[step % len(batches)]
        with search.sample():
            loss = functional.cross_entropy(model(inputs), labels)
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        search.update(quality=-loss.item())
