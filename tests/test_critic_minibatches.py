"""A critic's mini-batches of one train step, against the formula written out in float64."""

import numpy as np
import pytest
import torch
from test_critic import (
    Recording,
    give_value_head,
    make_engine,
    mask_some,
    prepare,
    rank_part,
    reference_values,
    relative_difference,
    samples_of,
)
from trainer_setup import make_groups, save_small_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


def test_later_mini_batches_clip_around_the_values_before_the_step(model_folder, tmp_path):
    """Every mini-batch by the formula, with the weights that it was trained on and the values of before the first."""
    groups = mask_some(make_groups())
    critic = {"eps_clip": 0.05, "ppo_n_minibatches": 3, "mb_spec": {"max_tokens_per_mb": 60}, "optimizer": {"lr": 2e-2}}
    config, engine = make_engine(model_folder, tmp_path, critic, cls=Recording)
    give_value_head(engine.critic.model.model)
    step, weights = engine.critic.model.optimizer_step, []

    def stepped(*args):
        weights.append({n: p.detach().double() for n, p in engine.critic.model.model.named_parameters()})
        return step(*args)

    engine.critic.model.optimizer_step = stepped
    prepared = prepare(config, engine, groups)
    stats = engine.train_step(rank_part(prepared.batch.minibatches), rank_part(prepared.batch.critic_minibatches))
    model, before = reference_values(model_folder, groups)
    old = [v.detach() for v in before]
    moved, clipped = 0, []
    for m, of_minibatch in enumerate(weights):
        model.load_state_dict(of_minibatch, strict=False)
        model.zero_grad()
        total, n = 0.0, 0
        for i in range(8 * m, 8 * m + 8):  # two groups of four
            t = samples_of(groups)[i]
            mask, returns = torch.from_numpy(t.loss_mask), float(t.reward)  # gamma = lambda = 1
            states = model.base_model(input_ids=torch.from_numpy(t.input_ids)[None], use_cache=False).last_hidden_state[0]
            v = torch.cat([torch.zeros(1), model.value_head(states[:-1]).squeeze(-1)])[mask]
            held = torch.clamp(v, old[i][mask] - 0.05, old[i][mask] + 0.05)
            plain, bound = (v - returns) ** 2, (held - returns) ** 2
            total, n = total + 0.5 * torch.maximum(plain, bound).sum(), n + int(mask.sum())
            clipped += (bound > plain).tolist()
            moved = max(moved, float((v - old[i][mask]).detach().abs().max()))
        (total / n).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert relative_difference(engine.gradients["critic"][m], expected) < 1e-5
    assert len(weights) == 3 and moved > 0.05, "else nothing was clipped"
    assert stats["value_clip_fraction"] == pytest.approx(np.mean(clipped)) and 0 < np.mean(clipped) < 1
