"""Exact second derivatives of small networks, by autograd over all weights at once."""

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from mpq.network.calibration import samples_in, split_batch
from mpq.network.layers import matrix_to_weight, output_matrix
from mpq.rounding.activations import fake_quantize_inputs
from mpq.sensitivity.derivatives import layer_uses


class Substituted(nn.Module):
    """The task's model with other values for its layers' weights; remembers its last output."""

    def __init__(self, task, values):
        super().__init__()
        names = [f"{layer.name}.weight" for layer in task.layers]
        self.model, self.values = task.model, dict(zip(names, values, strict=True))
        self.output = None

    def forward(self, *args):
        self.output = functional_call(self.model, self.values, args, tie_weights=True)
        return self.output


def _weights(task):
    return tuple(task.module(layer).weight.detach() for layer in task.layers)


def _in_blocks(matrix, task):
    sizes = [layer.params for layer in task.layers]
    return [list(row.split(sizes, 1)) for row in matrix.split(sizes)]


def exact_blocks(task):
    """Hessian of the loss per sample over all layers' weights, as blocks [i][j] of (size i, size j)."""
    total = sum(samples_in(batch) for batch in task.batches)

    def loss(*values):
        parts = (task.loss_fn(Substituted(task, values), batch) * samples_in(batch) for batch in task.batches)
        return sum(parts) / total

    blocks = torch.autograd.functional.hessian(loss, _weights(task))
    sizes = [layer.params for layer in task.layers]
    rows = [
        torch.cat([block.reshape(size, -1).double() for block in row], 1)
        for size, row in zip(sizes, blocks, strict=True)
    ]
    return _in_blocks(torch.cat(rows), task)


def gauss_newton_matrix(task):
    """J^T B J of the loss per sample over all layers' weights, (size, size)."""
    total = sum(samples_in(batch) for batch in task.batches)
    size = sum(layer.params for layer in task.layers)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for batch in task.batches:

        def output(*values, batch=batch):
            model = Substituted(task, values)
            task.loss_fn(model, batch)
            return model.output

        logits = output(*_weights(task)).detach()

        def loss(logits, batch=batch):
            class Constant(nn.Module):
                def forward(self, *args):
                    return logits

            return task.loss_fn(Constant(), batch)

        jacobians = torch.autograd.functional.jacobian(output, _weights(task))
        jacobian = torch.cat([part.reshape(logits.numel(), -1) for part in jacobians], 1).double()
        curvature = torch.autograd.functional.hessian(loss, logits).reshape(logits.numel(), -1).double()
        matrix += jacobian.T @ curvature @ jacobian * samples_in(batch) / total
    return matrix


def gauss_newton_blocks(task):
    """The same as blocks."""
    return _in_blocks(gauss_newton_matrix(task), task)


def hessian_matrix(task):
    """Hessian of the loss per sample over all layers' weights, (size, size)."""
    return torch.cat([torch.cat(row, 1) for row in exact_blocks(task)])


def exact_input_traces(task):
    """Mean over samples of the trace of each sample's Hessian in its inputs of every layer, call by call."""
    traces = np.zeros(len(task.layers))
    samples = [sample for batch in task.batches for sample in split_batch(batch)]
    for i, layer in enumerate(task.layers):
        modules = [task.model.get_submodule(name) for name in layer.names]
        modules = [module for module in modules if not isinstance(module, nn.Embedding)]
        for sample in samples:
            for call, shape in enumerate(_input_shapes(task, modules, sample)):

                def loss(shift, modules=modules, call=call, sample=sample):
                    with _shifted(modules, call, shift):
                        return task.loss_fn(task.model, sample)

                hessian = torch.autograd.functional.hessian(loss, torch.zeros(shape))
                size = int(np.prod(shape))
                traces[i] += hessian.reshape(size, size).trace().item() / len(samples)
    return traces


def _input_shapes(task, modules, sample):
    shapes = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape)) for module in modules
    ]
    task.loss_fn(task.model, sample)
    for handle in handles:
        handle.remove()
    return shapes


class _shifted:
    def __init__(self, modules, call, shift):
        self.modules, self.call, self.shift, self.count = modules, call, shift, 0

    def hook(self, module, args):
        self.count += 1
        return (args[0] + self.shift, *args[1:]) if self.count == self.call + 1 else args

    def __enter__(self):
        self.handles = [module.register_forward_pre_hook(self.hook) for module in self.modules]

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()


def output_differences(task, layer, scheme):
    """(use, change, gradient) of every call of the layer: difference of outputs and samples' gradients, as rows."""
    for index in range(len(task.batches)):
        for _, uses in layer_uses(task, index):
            for use in uses[layer.name]:
                before, inputs = use.module.weight.detach().clone(), use.inputs
                with torch.no_grad():
                    plain = use.module(inputs)
                    use.module.weight.copy_(matrix_to_weight(task.quantized(layer, scheme), use.module))
                    if scheme.activation is not None and not isinstance(use.module, nn.Embedding):
                        inputs = fake_quantize_inputs(use.module, inputs, scheme.activation)
                    changed = use.module(inputs)
                    use.module.weight.copy_(before)
                yield use, output_matrix(use.module, changed - plain), output_matrix(use.module, use.gradient)


def sample_gradients(task):
    """Gradient of every sample's own loss over all layers' weights, (samples, size)."""
    weights = [task.module(layer).weight for layer in task.layers]
    rows = []
    for batch in task.batches:
        for sample in split_batch(batch):
            parts = torch.autograd.grad(task.loss_fn(task.model, sample), weights)
            rows.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(rows)


def weight_errors(task, i, j):
    """Q(W_i) - W_i of layer i in scheme j, flat, in the order of the weight itself."""
    layer, scheme = task.layers[i], task.schemes[j]
    return matrix_to_weight(task.weight_error(layer, scheme), task.module(layer)).flatten().double()


def layer_slice(task, i):
    """Slice of layer i's weights in the vector of all weights."""
    start = sum(layer.params for layer in task.layers[:i])
    return slice(start, start + task.layers[i].params)
