"""The whole job on a language model in one call; `mpq quantize tiny-lm --bits 4.25 -o out` is the same.

With transformers installed, give the folder or hub id of a Llama instead of the bundled model:
`python examples/llama.py out meta-llama/Llama-3.2-1B`.
"""

import sys
import tempfile

import mpq

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
name = sys.argv[2] if len(sys.argv) > 2 else "tiny-lm"
source = mpq.open_source(name, nsamples=4, seqlen=64, evaluation_samples=4)
outcome = mpq.quantize(source, folder, bits=4.25, formats=["int3-g64", "int4-g64", "int8-channel"], effort="fast")
for row in outcome.rows():
    print(row.name, row.bits, row.quality, sep="\t")
print(outcome.allocation)
print(f"written to {outcome.folder}")
