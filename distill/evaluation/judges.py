"""Makes a judge of a model that is run here, or of one behind a server."""

from collections.abc import Mapping

from etils import epath

from distill import rollout
from distill.data import sources
from distill.evaluation.judging import TEMPLATE, JudgeSpec
from distill.policy import policy
from distill.rollout import completions, served_completions, served_model
from distill.rollout.sampling import Sampling
from distill.runtime import addresses
from models.errors import UserError

_IN_FLIGHT = 16  # requests, or responses that decode together
# Greedy and without thoughts: the same verdict each time, from a short reply.
_SAMPLE = rollout.SampleSpec(
    max_new_tokens=256, sampling=Sampling(temperature=0.0), batch_size=_IN_FLIGHT
)


def make_judge(
    model: str, template: str = "", *, served_model: str = "", api_key_env: str = ""
) -> JudgeSpec:
    """Makes the judge at a model directory, hub id, run directory or address.

    Raises UserError naming what is wrong with it, before anything is evaluated.
    """
    settings = {"max_new_tokens": _SAMPLE.max_new_tokens, "temperature": 0.0, "thinking": False}

    def ask_server(rows: sources.Rows, path: epath.Path) -> Mapping[int, str]:
        with _open_server(model, served_model, api_key_env) as served:
            thinking = served.kind == "other"  # whose servers have no such switch
            return served_completions.generate_file(served, rows, _SAMPLE, thinking, path)

    def ask_here(rows: sources.Rows, path: epath.Path) -> Mapping[int, str]:
        subject = policy.make_abstract_for_inference(model, "")
        return completions.generate_file(subject, rows, _SAMPLE, False, path, fits=True)

    if addresses.is_url(model):
        _open_server(model, served_model, api_key_env).client.close()
        return JudgeSpec(model, settings, ask_server, template or TEMPLATE)
    if served_model or api_key_env:
        raise UserError("--judge_model, --judge_api_key_env: are read with --judge=http://... only")
    policy.make_abstract_for_inference(model, "")
    return JudgeSpec(model, settings, ask_here, template or TEMPLATE)


def _open_server(model: str, name: str, api_key_env: str) -> served_model.ServedModel:
    try:
        return served_model.open_served_model(
            model, _IN_FLIGHT, served_model=name, api_key_env=api_key_env, tokenizer=""
        )
    except UserError as error:
        reason = str(error).replace("--served_model", "--judge_model")
        raise type(error)(f"--judge: {reason.removeprefix('--model=')}") from error
