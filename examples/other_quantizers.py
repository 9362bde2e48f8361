"""Use another quantizer: write our allocation as its configuration, and compare its present configuration with ours.

python examples/other_quantizers.py
"""

import tempfile
from pathlib import Path

import mpq
from mpq.exporters.configurations import TOOLS, write_configuration
from mpq.exporters.holding import restrict
from mpq.judge_files import judge_files


def main() -> None:
    source = mpq.open_source("tiny-lm", nsamples=8, seqlen=64, evaluation_samples=8)
    formats = ["int3-g64", "int4-g64", "int8-channel"]
    table = mpq.profile(source.model, source.calibration, source.loss_fn, formats, metric="fisher", progress=False)
    held = restrict(table, TOOLS["gptqmodel"])  # or a target: mpq.exporters.targets.TARGETS["vllm"]
    print(held.sentence)
    allocation = mpq.allocate(held.table, bits=5.5, forbid=held.forbid).allocation
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantize_config.json"
        file.write_text(write_configuration("gptqmodel", allocation))
        for row in judge_files(source, [str(file)], table=table, progress=False):
            print(f"{row.name.split('/')[-1]:24} {row.size:>10,} bytes  loss +{row.increase:.4f}")


if __name__ == "__main__":
    main()
