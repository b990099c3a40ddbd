"""benchmark/speed.py, with scripts and a peer that take milliseconds."""

import json
import shutil

import pandas as pd
import pytest
from tools import ROOT, fake_script, run

from benchmark import speed

SPEED = ROOT / "benchmark" / "speed.py"
PEER = """
import json, sys
job = json.loads(sys.argv[1])
about = {"env_id": job["env_ids"][-1], "threads": 2, "versions": {"torch": "2.0"}}
print("PEER", json.dumps(about))
print("SPS: 1")
print("SPS:", 1000 * (1 + job["seed"]))
"""


def test_a_script_alone(tmp_path):
    fake_script(tmp_path)
    text = (tmp_path / "fake.py").read_text().replace("resume: str", "eval_episodes: int = 1\n    resume: str")
    (tmp_path / "fake.py").write_text(text)
    out = run(SPEED, "fake.py", "--total-timesteps", 500, "--repeats", 2, cwd=tmp_path).stdout
    assert out.count("steps/s") == 4 and "1,000 steps/s, 500 steps a run" in out
    assert [path.name for path in tmp_path.iterdir()] == ["fake.py"]


PAIRS = [(script, peer) for script in speed.PRESETS for peer in ("cleanrl", "sb3")]
PAIRS = [(script, peer) for script, peer in PAIRS if peer == "sb3" or peer in speed.PRESETS[script]]


@pytest.mark.parametrize("script, peer", PAIRS)
def test_presets_are_flags_of_the_scripts(script, peer, tmp_path):
    preset = speed.PRESETS[script]
    args = speed.Args(ROOT / "algos" / f"{script}.py", peer, threads=3)
    known = speed.runs.defaults(args.script.read_text())
    flags = speed.runs.flags_of(speed.our_command(args, preset, 1, 1000, tmp_path, [])[2:])
    assert flags.keys() <= known.keys() and flags["torch_threads"] == "3"
    job = json.loads(speed.peer_command(args, preset, 7, 1000)[-1])
    assert (job["seed"], job["steps"], job["threads"]) == (7, 1000, 3)
    assert job["script"].endswith(preset["cleanrl"]) if peer == "cleanrl" else job["arguments"]["gamma"] == 0.99


def test_a_pair_is_saved(tmp_path, monkeypatch, capsys):
    """Our script is as fast as its fake says, 1000 steps/s; a peer 2000 with seed 1 and 4000 with seed 3."""
    monkeypatch.setattr(speed, "SAVED", tmp_path / "speed.csv")
    monkeypatch.setattr(speed, "PEER", tmp_path / "peer.py")
    about = {"cpu": "a CPU", "gpu": "", "threads": 1, "commit": "abcdefgh"}
    monkeypatch.setattr(speed, "measure_ours", lambda *_: (1000.0, about))
    (tmp_path / "cleanrl" / "cleanrl").mkdir(parents=True)
    (tmp_path / "cleanrl" / "cleanrl" / "ppo.py").touch()
    (tmp_path / "peer.py").write_text(PEER)
    shutil.copy(ROOT / "algos" / "ppo.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", "speed.py ppo.py --peer cleanrl --peer-path cleanrl --save --repeats 3".split())
    for _ in range(2):
        speed.main()
    assert "ratio 0.33 [0.25, 0.50]" in capsys.readouterr().out
    saved = pd.read_csv(tmp_path / "speed.csv")
    assert saved["ratio"].round(3).tolist() == [0.333, 0.333] and saved["pairs"].tolist() == [3, 3]


@pytest.mark.parametrize(
    "words", ["gone.py", "fake.py", "fake.py --total-timesteps 9 --repeats 0", "ppo.py --peer cleanrl"]
)
def test_bad_input_is_one_line(words, tmp_path):
    fake_script(tmp_path)
    shutil.copy(ROOT / "algos" / "ppo.py", tmp_path)
    assert run(SPEED, *words.split(), cwd=tmp_path, code=2).stderr.startswith("error: ")
