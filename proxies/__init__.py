"""Training-free scores as programs over layer statistics, their evolution, and benchmarks to judge them on.

A proxy estimates the loss of a layer in a scheme: lower is better, and layers add up. Scores that their authors
multiply by bits, higher being better, are negated here.
"""

# name: (formula, what it is). EMQ's code multiplies a layer's score by its bits; the papers' own forms stand beside it.
PROXIES: dict[str, tuple[str, str]] = {
    "bits": ("-bits", "sum of bits"),
    "size": ("-bytes", "stored bytes"),
    "bitops": ("-bits * macs", "bit operations with equal activation bits"),
    "snip": ("-bits * l1(weight * grad)", "SNIP: |w g| (arXiv 1810.02340, equation 6)"),
    "plain": ("-bits * sum(weight * grad)", "plain: w g, signed (arXiv 2101.08134, section 3.2)"),
    "grasp": ("bits * sum(weight * hessgrad)", "GraSP: -w (H g) (arXiv 2002.07376, equation 8)"),
    "synflow": ("-bits * l1(weight * virtual)", "Synflow: |w dR/dw|, R the outputs on ones (arXiv 2006.05467)"),
    "fisher": ("-bits * sum(square(act * actgrad))", "Fisher pruning: (a g_a)^2 (arXiv 1801.05787)"),
    "bn": ("-bits * log(std(act))", "BN-score: log of the outputs' deviation, which a batch norm stores"),
    "qe": ("-log(std(weight + error)) - log(std(act))", "QE-score: entropy of the quantized weights and outputs"),
    "ompq": ("-bits * exp(-similarity)", "OMPQ: orthogonality of the outputs (arXiv 2109.07865, equation 9)"),
    "hawq": ("eigenvalue * sum(square(error))", "HAWQ: top eigenvalue x squared error (arXiv 1905.03696, section 3.2)"),
    "hawq-v2": ("trace / params * sum(square(error))", "HAWQ-V2: mean trace x squared error (arXiv 1911.03852)"),
    "hawq-bits": ("-bits * eigenvalue", "HAWQ as EMQ's code has it: eigenvalue x bits"),
    "hawq-v2-bits": ("-bits * trace", "HAWQ-V2 as EMQ's code has it: trace x bits, without the error"),
    "mse": ("sum(square(error))", "squared weight error"),
    "fisher-error": ("sum(fisher * square(error))", "diagonal Fisher x squared errors"),
    "snip-error": ("l1(grad * error)", "first-order term of the loss, by magnitude"),
    "emq": ("-bits * mean(softmax(abslog(virtual)) * sqrt(relu(weight)))", "EMQ's best, decoded from its code"),
}
