"""Every objective, preferences and adapters on two ranks that share sequences, and adapters on replicas: the gradients of one rank."""

from functools import partial

import pytest
import torch
from rank_processes import run_worlds
from test_lora_ranks import Recording, make_pairs
from test_objectives import CASES, TEMPERATURE, VERSION, make_parts
from test_trainer_engine import relative_difference
from trainer_setup import make_config, save_small_model

from areal.config import DPOConfig, RefConfig
from areal.models import selfcheck
from areal.ops.weights_hash import weights_hash
from areal.preferences import make_dpo_batch
from areal.trainer.engine import RankMinibatch
from areal.trainer.mesh import RankMesh

pytestmark = pytest.mark.timeout(300)

LORA = {"lora": {"rank": 4, "alpha": 8.0}}
ON_CONTEXT_RANKS = ["grpo", "dr_grpo", "gspo", "mis", "loglinear", "tis_sequence", "filter_sequence", "entropy", "k2", "dpo", "lora"]
JOBS = {1: [(name, "d1") for name in ON_CONTEXT_RANKS], 2: [*((name, "d1c2") for name in ON_CONTEXT_RANKS), ("lora", "d2r2")]}


def run_layout(folder, name, layout, rank):
    selfcheck.check_model = lambda config: None  # test_selfcheck has these models
    actor = CASES[name].actor if name in CASES else {"lora": LORA, "dpo": {}}[name]
    optimizer = {"lr": 0.2, "eps": 1e-2, "gradient_clipping": 1e9}
    config = make_config(folder, folder, optimizer=optimizer, backend=f"fsdp:{layout}", **actor)
    mesh = RankMesh(torch.device("cpu"), rank, config.trainer_layout)
    ref = RefConfig() if name == "dpo" else None
    engine = Recording(folder, config.actor, temperature=TEMPERATURE, mesh=mesh, ref=ref, seed=5)
    engine.version = VERSION
    if name == "dpo":
        batch = make_dpo_batch(make_pairs(5), 90, mesh.layout.data)
        parts = [RankMinibatch(m.ranks[mesh.data_index], m.denominator) for m in [batch]]
        stats = engine.dpo_step(parts[0], DPOConfig(beta=0.5, label_smoothing=0.1))
    else:
        stats = engine.train_step(make_parts(config.actor, 60, mesh.layout.data, mesh.data_index))
    weights = engine.snapshot()
    published = {}
    for part in engine.gatherer.parts(4096):
        published |= {n: w.clone() for n, w in part.items()}
    return engine.gradients, stats, rank == 0 and (weights_hash(weights), weights_hash(published))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = save_small_model(tmp_path_factory.mktemp("objectives"))
    worlds = run_worlds({n: [partial(run_layout, folder, *job) for job in jobs] for n, jobs in JOBS.items()}, folder)
    return {job: ranks[0] for n, jobs in JOBS.items() for job, ranks in zip(jobs, worlds[n], strict=True)}


@pytest.mark.parametrize("job", JOBS[2], ids="-".join)
def test_gradients_and_statistics_are_those_of_one_rank(results, job):
    (one, stats_of_one, _), (two, stats, hashes) = results[job[0], "d1"], results[job]
    assert len(one) == len(two)
    assert max(relative_difference({n: two[0][n]}, {n: g}) for n, g in one[0].items() if g.norm() > 0) < 1e-6
    for first, second in zip(one, two, strict=True):
        assert relative_difference(second, first) < 3e-6
    for key, value in stats_of_one.items():
        if key not in ("spans", "meters", "logprob_drift"):
            assert stats[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert hashes[0] == hashes[1]
