"""Tests a teacher on servers: this project's own, run here, and fakes of vLLM and SGLang."""

import json

import numpy as np
import pytest

from configs import base
from distill.policy import policy
from distill.runtime import http_client
from distill.runtime import mesh as mesh_lib
from distill.runtime.http_client import BadReply, Reply
from distill.serving.server import ServerOptions, open_server
from distill.teachers import endpoints, remote
from distill.teachers.outputs import ScorerInfo
from distill.teachers.remote import RemoteScorer
from models.errors import SourceFailure, UserError
from tests.support import http_servers
from tests.support.http_servers import Answer, Asked
from tests.support.runs import tiny_model
from tests.support.scorers import LocalScorer
from tests.support.teacher_servers import ANSWERS, FAULTS, NAME

RESPONSES = [([5, 6, 7], [8, 9]), ([3], [4, 100, 17, 21]), ([40] * 60, [1])]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "student", 0), tiny_model(root / "teacher", 1, hidden_size=48)


@pytest.fixture(scope="module")
def reference(models):
    return LocalScorer(models[1], k=20)


def describe(path):
    return policy.make_abstract(path, "float32", False, mesh_lib.make_mesh(1, 1, 1))


@pytest.fixture(scope="module")
def url(models, tmp_path_factory):
    """Serves the teacher."""
    with (
        pytest.MonkeyPatch.context() as patch,
        open_server(describe(models[1]), "float32", ServerOptions(port=0)) as running,
    ):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield running.url


def make_scorer(path, output, top_k=0, **keys):
    t = base.make_teacher()
    t.update({"path": path, **keys})
    return RemoteScorer(t, "config.teacher", output, top_k, 512)


def require_scores(scorer, reference, top_k=0):
    """Compares the scores of all responses, asked for at once."""
    futures = [scorer.submit(*x) for x in RESPONSES]
    for future, (prompt, response) in zip(futures, RESPONSES, strict=True):
        expected = reference.score(prompt, response)
        for name, values in future.result(60).get_fields().items():
            wanted = getattr(expected, name)
            wanted = wanted[:, :top_k] if name.startswith("top") else wanted
            np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("output", "top_k"), [("token", 0), ("top", 5), ("hidden", 0)])
def test_our_server_scores_as_its_model_does(output, top_k, url, models, reference):
    scorer = make_scorer(url, output, top_k)
    scorer.check(describe(models[0]))
    require_scores(scorer, reference, top_k)
    if output == "hidden":
        np.testing.assert_array_equal(scorer.head_VE, reference.head_VE)
        (file,) = remote._get_head_cache().iterdir()
        file.write_bytes(file.read_bytes()[:-1])  # damaged: fetched again
        np.testing.assert_array_equal(make_scorer(url, output).head_VE, reference.head_VE)
    scorer.close()


@pytest.fixture
def quick(monkeypatch):
    """Waits for servers hardly at all."""
    monkeypatch.setattr(http_client, "WAIT_SECONDS", (0.01, 0.01, 0.01))


class Server:
    """A fake server of a kind, whose answers to scoring can be changed."""

    def __init__(self, kind, scorer):
        self.kind, self.use = kind, scorer
        self.faults = []  # of the next answers
        self.scoring = {"vllm": "/v1/completions", "sglang": "/generate", "ours": "/v1/score"}[kind]

    def __call__(self, asked):
        good = ANSWERS[self.kind](self.use)(asked)
        is_scoring = asked.path == self.scoring and "text" not in asked.body
        return self.faults.pop(0)(good) if self.faults and is_scoring else good


@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("kind", ["vllm", "sglang", "ours"])
def test_the_documented_shapes_are_read(kind, top_k, models, reference):
    output = "top" if top_k else "token"
    with http_servers.serve(Server(kind, reference)) as server:
        scorer = make_scorer(server.url + "/v1/", output, top_k, kind=kind, max_in_flight=1)
        scorer.check(describe(models[0]))
        require_scores(scorer, reference, top_k)
        assert scorer.info.context_length == 128
        scorer.close()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["vllm", "sglang", "ours"])
def test_a_fault_that_passes_changes_nothing(kind, fault, reference, quick):
    answer = Server(kind, reference)
    with http_servers.serve(answer) as server:
        timeout = 0.5 if fault == "slow" else 30
        scorer = make_scorer(server.url, "token", kind=kind, timeout_seconds=timeout)
        answer.faults += [FAULTS[fault]] * 2
        require_scores(scorer, reference)
        assert not answer.faults
        scorer.close()


@pytest.mark.parametrize("kind", ["vllm", "sglang", "ours"])
def test_a_server_that_returns_with_another_model_does_not_teach(kind, models, reference, quick):
    answer = Server(kind, reference)
    with http_servers.serve(answer) as server:
        scorer = make_scorer(server.url, "token", kind=kind)
        scorer.check(describe(models[0]))
        answer.use = LocalScorer(models[0])
        future = scorer.submit(*RESPONSES[0])
        with pytest.raises(SourceFailure, match=r"config\.teacher\.path: .*another model"):
            future.result(60)
        scorer.close()


@pytest.mark.parametrize("fault", ["500", "dropped", "another model"])
def test_another_server_takes_over(fault, models, reference):
    """Without waiting for the one that fails for good."""
    good, bad = Server("vllm", reference), Server("vllm", reference)
    with http_servers.serve(good) as first, http_servers.serve(bad) as second:
        scorer = make_scorer(f"{first.url}, {second.url}", "token", kind="vllm")
        scorer.check(describe(models[0]))
        bad.faults += [FAULTS.get(fault, lambda good: good)] * 100
        bad.use = LocalScorer(models[0]) if fault == "another model" else reference
        require_scores(scorer, reference)
        scorer.close()


def test_what_a_server_refuses_in_the_middle_of_a_run_stops_it_at_a_checkpoint(reference, quick):
    """It took the same at the start; only a SourceFailure is a reason to save and stop."""
    answer = Server("vllm", reference)
    with http_servers.serve(answer) as server:
        scorer = make_scorer(server.url, "token", kind="vllm")
        answer.faults.append(lambda good: Answer({"error": {"message": "gone"}}, 404))
        with pytest.raises(SourceFailure, match="status 404: gone"):
            scorer.submit(*RESPONSES[0]).result(60)
        scorer.close()


def test_many_responses_share_requests(reference):
    answer = Server("ours", reference)
    with http_servers.serve(answer) as server:
        scorer = make_scorer(server.url, "token", max_in_flight=2)
        asked = [([i + 1], [7, 8]) for i in range(100)]
        futures = [scorer.submit(*x) for x in asked]
        for future, x in zip(futures, asked, strict=True):
            found = future.result(60).logp
            assert found is not None
            np.testing.assert_allclose(found, reference.compute(*x)["logp"], atol=1e-6)
        posts = [x for x in server.asked if x.path == "/v1/score"]
        assert server.most_in_flight <= 2 and len(posts) < 50
        assert sum(len(x.body["sequences"]) for x in posts) == 100
        scorer.close()


REFUSED = {
    "no such kind": ({"kind": "tgi"}, "config.teacher.kind='tgi': must be one of 'ours', 'vllm'"),
    "hidden states": ({"output": "hidden"}, "config.teacher.kind=vllm: gives token or top .* not"),
    "another name": ({"model": "other"}, "serves served; config.teacher.model='other' names"),
    "no seconds": ({"timeout_seconds": -1.0}, r"timeout_seconds=-1.0: must be at least 0 \(300\)"),
    "another kind": ({"kind": "ours"}, "the reply has no vocab_size: no server of kind ours"),
    "no variable": ({"api_key_env": "NOT_SET"}, "config.teacher.api_key_env: names an environ"),
    "too many": (
        {"output": "top", "top_k": 50},
        "config.teacher.path: .*max allowed: 20; .*--max-logprobs",
    ),
    "no server": ({"path": "http://127.0.0.1:9"}, "config.teacher.path: .*connection is refused"),
    "no address": ({"path": "http://"}, "config.teacher.path.*no address of a server"),
    "the same twice": ({"path": "{url},{url}"}, "config.teacher.path.*names a server twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_teach_is_refused_before_the_first_step(case, models, reference, quick):
    changes, words = REFUSED[case]
    keys: dict = {"path": "{url}", "output": "token", "kind": "vllm", **changes}
    with http_servers.serve(Server("vllm", reference)) as server:
        path = keys.pop("path").replace("{url}", server.url)
        with pytest.raises(UserError, match=words):
            make_scorer(path, **keys).check(describe(models[0]))


def test_servers_of_different_models_are_refused(models, reference):
    one, other = Server("ours", reference), Server("ours", LocalScorer(models[0]))
    words = r"config\.teacher\.path: .*serves served .*, but http"
    with (
        http_servers.serve(one) as first,
        http_servers.serve(other) as second,
        pytest.raises(UserError, match=words),
    ):
        make_scorer(f"{first.url},{second.url}", "token")


@pytest.mark.parametrize("kind", ["vllm", "sglang", "ours"])
def test_other_tokens_for_the_same_text_are_refused(kind, models, reference):
    answer = Server(kind, reference)

    def read_otherwise(asked):
        good = answer(asked)
        is_text = asked.body and isinstance(asked.body.get("prompt", asked.body.get("text")), str)
        return FAULTS["other ids"](good) if is_text else good

    with http_servers.serve(read_otherwise) as server:
        scorer = make_scorer(server.url, "token", kind=kind)
        with pytest.raises(UserError, match="reads a text as other tokens than the student"):
            scorer.check(describe(models[0]))


def test_unequal_answers_to_equal_requests_are_told(models, reference, capsys):
    """A little, as in bfloat16, is said; more is no teacher."""
    answer, distance = Server("vllm", reference), [0.01]

    def answer_unsteadily(asked):
        good = answer(asked)
        for choice in good.body.get("choices", ()):
            for row in (choice["prompt_logprobs"] or [])[1:]:
                for entry in row.values():
                    entry["logprob"] -= distance[0] * len(server.asked)
        return good

    with http_servers.serve(answer_unsteadily) as server:
        make_scorer(server.url, "token", kind="vllm").check(describe(models[0]))
        assert "equal requests get answers 1.0e-02 nats apart" in capsys.readouterr().err
        distance[0] = 0.5
        with pytest.raises(UserError, match=r"differ by 0\.50 nats on average: no teacher"):
            make_scorer(server.url, "token", kind="vllm").check(describe(models[0]))


JUNK = (None, True, -1, 10**30, 1e400, -1e308, float("nan"), "x", "9" * 30, [], {}, [[]])


def list_places(value):
    """Returns (container, key) of everything in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from list_places(inner)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_any_other_reply_is_read_or_tried_again(kind, reference):
    """Each place of a good reply is replaced by what does not belong there, or left out."""
    endpoint = endpoints.KINDS[kind]()
    info = ScorerInfo(NAME, ("token", "top"), 512)
    question, items = endpoints.Question("top", 2, info), RESPONSES[:2]
    body = endpoint.make_body(question, items)
    good = ANSWERS[kind](reference)(Asked(endpoint.path, {}, body)).body

    def read(value):
        reply = Reply("http://teacher", 200, {}, json.dumps(value).encode())
        return endpoints.read_reply(endpoint, question, items, reply)

    assert len(read(good)) == 2
    num_refused = 0
    for number in range(len(list(list_places(good)))):
        for junk in JUNK:
            bad = json.loads(json.dumps(good))
            container, key = list(list_places(bad))[number]
            container[key] = junk
            try:
                assert len(read(bad)) == 2
            except BadReply:
                num_refused += 1
    assert num_refused > 100
