"""Stands in for studies.worker, without jax: writes the files of a run at once.

Its accuracy is best at the learning rate 0.3, and rises by a hundredth with each seed. With the
learning rate 9 it fails. It counts its runs in the file runs.txt beside the models.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    words = [word.removeprefix("--").partition("=") for word in sys.argv[1:]]
    flags = [(name, value) for name, _, value in words]
    values = dict(flags)
    workdir = Path(values["workdir"])
    with (workdir.parents[1] / "runs.txt").open("a") as file:
        print(workdir.name, file=file)
    rate = float(values.get("config.opd.optim.learning_rate", 0.2))
    if rate == 9:
        sys.exit("it diverges")
    accuracy = 0.8 - abs(rate - 0.3) + int(values["seed"]) / 100 if "seed" in values else 0.25
    names = [value.partition(":")[0] for name, value in flags if name == "measure"]
    measured = {"prompt_tokens": 10, "figures": dict.fromkeys(names, accuracy)}
    if "config" in values:
        loss, lora = {"reference": None}, {"rank": 0}
        stage = {"objective": "opd", "batch_size": 4, "teachers": ["teacher"], "loss": loss}
        stage["optim"] = {"learning_rate": rate}
        config = {"stages": ["opd"], "opd": stage, "student": {"lora": lora}}
        models = {"student": {"flops_per_token": 100}, "teacher": {"flops_per_token": 300}}
        row = {"time/step": 0.5, "train/trained_tokens": 24, "train/loss": 1.0}
        row |= {"rollout/rows/think": 4, "rollout/mean_length": 6, "train/reverse_kl": 0.1}
        row["eval/accuracy"] = accuracy
        (workdir / "config.json").write_text(json.dumps(config))
        (workdir / "environment.json").write_text(json.dumps({"models": models}))
        (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (workdir / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
