"""python -m distill.serve --model=DIR [--port=8000]: serves a model over HTTP, as OpenAI's API.

/v1/completions (prompts of text or token ids; echo, logprobs, prompt_logprobs, n, stop, seed,
stream), /v1/chat/completions, /v1/models, /health and /metrics (Prometheus). /v1/score and /v1/head
make it a teacher for a run elsewhere: log-probabilities of given tokens, the likeliest tokens, or
the final hidden states with the output head, in safetensors. All requests share the slots of one
sampler, and join while it runs; a request with a seed gets the tokens that `generate` draws under
it. Log-probabilities are the model's own (temperature 1, without cut-offs and penalties).

Only this machine reaches it, unless --host says otherwise; then clients must send a bearer token,
which is the value of the environment variable that --api_key_env names. SIGTERM and Ctrl-C refuse
new requests, give running ones --stop_seconds, and end.
"""

import os

from absl import flags

from distill.runtime import cli, console
from models.errors import UserError

OPTIONS = flags.FlagValues()
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
MODEL, DTYPE = cli.define_model_flags(OPTIONS, dtypes=DTYPES)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.", OPTIONS)
PORT = flags.DEFINE_integer("port", 8000, "Port; 0: a free one.", 0, 65535, OPTIONS)
NAME = flags.DEFINE_string("name", "", "Name of the model for clients; default: --model.", OPTIONS)
API_KEY_ENV = flags.DEFINE_string(
    "api_key_env",
    "",
    "Name of the environment variable with the token that clients must send.",
    OPTIONS,
)
WITHOUT_TOKEN = flags.DEFINE_bool(
    "without_token", False, "Listen beyond this machine without a token.", flag_values=OPTIONS
)
SLOTS = flags.DEFINE_integer("slots", 32, "Responses that decode together.", 1, flag_values=OPTIONS)
MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    0,
    "Tokens of a prompt and its response. Default: the model's positions, at most 8,192.",
    0,
    flag_values=OPTIONS,
)
CACHE_TOKENS = flags.DEFINE_integer(
    "cache_tokens",
    0,
    "Tokens that the cache holds in all; 0: slots × max_length.",
    0,
    None,
    OPTIONS,
)
DRAFTS = flags.DEFINE_string(
    "drafts",
    "",
    "ngram: each step guesses further tokens and keeps those that it draws itself: the same tokens "
    "in fewer steps. Default: off.",
    OPTIONS,
)
DRAFT_TOKENS = flags.DEFINE_integer(
    "draft_tokens", 3, "Tokens that a step guesses at most for a response.", flag_values=OPTIONS
)
MAX_QUEUE = flags.DEFINE_integer(
    "max_queue", 256, "Sequences that may wait; requests beyond get 429.", 1, flag_values=OPTIONS
)
MAX_LOGPROBS = flags.DEFINE_integer(
    "max_logprobs", 20, "Likeliest tokens at most of each generated token.", 1, flag_values=OPTIONS
)
MAX_TOP_K = flags.DEFINE_integer(
    "max_top_k", 256, "Likeliest tokens at most of each scored token.", 1, flag_values=OPTIONS
)
MAX_BODY_MIB = flags.DEFINE_float(
    "max_body_mib", 16.0, "MiB at most of a request's body.", 0.001, flag_values=OPTIONS
)
TIMEOUT_SECONDS = flags.DEFINE_float(
    "timeout_seconds", 600.0, "Seconds that a request may take.", 0.1, flag_values=OPTIONS
)
STOP_SECONDS = flags.DEFINE_float(
    "stop_seconds", 20.0, "Seconds that running requests get at the end.", 0.0, 200.0, OPTIONS
)


def read_token() -> str:
    """Returns the token that clients must send; "": none.

    Raises:
      UserError: if the variable is empty, or others would reach the server without a token.
    """
    from distill.serving import server

    name = API_KEY_ENV.value
    token = os.environ.get(name, "") if name else ""
    if name and not token:
        raise UserError(
            f"--api_key_env={name}: the environment has no such variable, or it is empty"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"--api_key_env={name}: a token has visible ASCII characters only")
    if not token and not server.is_loopback(HOST.value) and not WITHOUT_TOKEN.value:
        raise UserError(
            f"--host={HOST.value}: other machines would reach the server without a token; name an "
            "environment variable that holds one (--api_key_env), or say --without_token"
        )
    return token


def main() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not is_found(name)]
    if missing:
        raise UserError(f"{missing[0]} is not installed: pip install -r requirements-serve.txt")
    import jax

    from distill.policy import policy
    from distill.runtime import run_files, xla
    from distill.serving.server import ServerOptions, open_server

    token = read_token()
    if jax.process_count() > 1:
        raise UserError("serve runs in one process, on the devices that this process has")
    xla.init_compilation_cache()
    subject = policy.make_abstract_for_inference(MODEL.value, DTYPE.value)
    options = ServerOptions(
        host=HOST.value,
        port=PORT.value,
        name=NAME.value,
        token=token,
        slots=SLOTS.value,
        max_length=MAX_LENGTH.value,
        cache_tokens=CACHE_TOKENS.value,
        drafts=DRAFTS.value,
        draft_tokens=DRAFT_TOKENS.value,
        max_queue=MAX_QUEUE.value,
        max_logprobs=MAX_LOGPROBS.value,
        max_top_k=MAX_TOP_K.value,
        max_body_mib=MAX_BODY_MIB.value,
        timeout_seconds=TIMEOUT_SECONDS.value,
        stop_seconds=STOP_SECONDS.value,
    )
    with open_server(subject, DTYPE.value or subject.dtype, options) as running:
        console.print_end([f"serving {MODEL.value} at {running.url}"])
        try:
            running.wait()
        except KeyboardInterrupt:
            if num_cut := running.stop(options.stop_seconds):
                run_files.log_line(f"{num_cut} requests were cut off")
            raise


def is_found(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    cli.run(main, OPTIONS)
