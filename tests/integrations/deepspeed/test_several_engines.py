"""Several engines in one process: actor, critic and reward model, a GAN; evaluation and generation between steps."""

from __future__ import annotations

from engine_ranks import run_engines

HEAD = """
from torch import nn
from torch.nn import functional

WARN = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000))
LAST = int(os.environ["WORLD_SIZE"]) - 1


class Tokens(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(8, 16), nn.Linear(16, 24), nn.Linear(24, width)

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def engine_of(model, seed, setup, stage, **options):
    torch.manual_seed(seed)
    return support.make_engine(setup, stage=stage, model=model(), **options)


def seen(guard):
    report = guard.last_report
    return report and (report.step, report.verdict, report.first.kind, report.first.name, report.first.rank)
"""

REWARDS = """
support.allow_fp16()  # and nothing is compiled


def reward_model():
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    torch.manual_seed(5)
    return deepspeed.initialize(model=Tokens(1), config=config)[0]


def update(actor, critic, number, bad=None):
    tokens = torch.randint(0, 8, (4, 6), generator=torch.Generator().manual_seed(number + 100 * RANK))
    actor.eval()
    with torch.no_grad():
        for _ in range(2):
            tokens = torch.cat([tokens[:, 1:], actor.module(tokens)[:, -1:].float().argmax(-1)], 1)
        before = actor(tokens).float().log_softmax(-1)
        reward = reward_of(tokens).float().mean(1)[:, :, None]
    actor.train()
    actor(tokens)  # no backward pass follows
    losses = []
    for epoch in range(2):
        ratio = (actor(tokens).float().log_softmax(-1) - before).gather(-1, tokens[..., None]).exp()
        for engine, loss in (
            (actor, -(ratio * reward).mean()),
            (critic, (critic(tokens).float() - reward).square().mean()),
        ):
            is_bad = engine is bad and epoch == 1 and RANK == LAST
            losses.append(loss.item())
            engine.backward(loss * torch.nan if is_bad else loss)
            engine.step()
    return losses


reward_of = reward_model()
for setup, stage, options in (("fp16", 2, {"hybrid_engine": {"enabled": True}}), ("bf16", 3, {})):
    engines = [
        (engine_of(Tokens, 1, setup, stage, **options), engine_of(lambda: Tokens(1), 2, setup, stage)) for _ in range(2)
    ]
    actor, critic = engines[0]
    guards = [ng.attach(actor, WARN, also={"reward": reward_of}), ng.attach(critic, WARN)]
    for number in range(3):
        losses = [update(*pair, number) for pair in engines]
        assert losses[0] == losses[1], (setup, losses)
    for guard in guards:
        assert guard.last_report is None and guard.findings == [] and len(guard.history) == 6, setup
    update(actor, critic, 3, bad=actor)
    assert seen(guards[0]) == (8, "undetermined", "loss", "loss", LAST) and seen(guards[1]) is None, setup
    update(actor, critic, 4, bad=critic)
    assert seen(guards[1]) == (10, "undetermined", "loss", "loss", LAST), (setup, seen(guards[1]))
    ng.inject(critic, "parameter", "hidden.weight", index=(2, 3))
    update(actor, critic, 5)
    assert seen(guards[1])[1:] == ("weights_nonfinite", "parameter", "hidden.weight", 0), (setup, seen(guards[1]))
    assert seen(guards[0])[0] == 8, setup
    if stage == 3:
        support.plant(reward_of, "head.weight", (0, 3))
        update(actor, critic, 6)
        assert seen(guards[0])[1:] == ("weights_nonfinite", "parameter", "reward.module.head.weight", 0), guards[0]
    for guard in guards:
        guard.detach()
"""


def test_actor_critic_and_reward_model():
    run_engines(f"{HEAD}{REWARDS}")


GAN = """
class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 6)

    def forward(self, z):
        return self.last(torch.tanh(self.first(z)))


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def turns(generator, discriminator, number, bad=""):
    random = torch.Generator().manual_seed(number + 100 * RANK)
    dtype = next(generator.module.parameters()).dtype
    z, other, x = (torch.randn(4, width, generator=random).to(dtype) for width in (4, 4, 6))
    for name, tensor in (("x", x), ("z", other)):
        if name == bad and RANK == LAST:
            tensor[1, 2] = torch.nan
    fake = discriminator(generator(z).detach())
    first = functional.softplus(-discriminator(x).float()).mean() + functional.softplus(fake.float()).mean()
    discriminator.backward(first)
    discriminator.step()
    discriminator.module.requires_grad_(False)
    second = functional.softplus(-discriminator.module(generator(other)).float()).mean()
    generator.backward(second)
    generator.step()
    discriminator.module.requires_grad_(True)
    return first.item(), second.item()


for setup, stage in (("fp32", 0), ("fp16", 2)):
    engines = [
        (engine_of(Generator, 1, setup, stage), engine_of(Discriminator, 2, setup, stage)) for _ in range(2)
    ]
    generator, discriminator = (ng.attach(engine, WARN) for engine in engines[0])
    for number in range(3):
        losses = [turns(*pair, number) for pair in engines]
        assert losses[0] == losses[1], (setup, losses)
    assert generator.last_report is None and discriminator.last_report is None, setup
    turns(*engines[0], 3, bad="x")
    found = seen(discriminator)
    assert found == (4, "input_nonfinite", "input", "x", LAST) and seen(generator) is None, (setup, found)
    turns(*engines[0], 4, bad="z")
    assert seen(generator) == (5, "input_nonfinite", "input", "z", LAST), (setup, seen(generator))
    assert seen(discriminator) == found, setup
    for guard in (generator, discriminator):
        guard.detach()
"""


def test_the_two_engines_of_a_gan():
    run_engines(f"{HEAD}{GAN}")
