"""Method critic: SFT on the best of several responses, as a critic sees them.

Beside Algorithm 1, with its generation, training, evaluation and team. docs/concepts/critic.md says
when it can gain something that SFT on the targets cannot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpaw.config.plan import players_of
from tpaw.config.schema import RunConfig
from tpaw.team import Player, Team

if TYPE_CHECKING:
    from tpaw.pipeline.stages import Stages


def critic_loop(config: RunConfig, stages: Stages) -> Player:
    """Answer, fit the critic, choose and train, as often as there are iterations.

    A stage whose output is published returns at once.
    """
    history = [stages.initial_player()]
    stages.evaluate(history[-1])
    for t in range(config.iterations):
        stages.generate(history[-1], stages.load_examples(t), t)  # several responses to each prompt
        team = Team(*players_of(config, history))
        stages.fit_critic(team.opponents, t)  # on targets against the opponents' responses
        chosen = stages.choose(t)  # of each prompt, the response that the critic likes best
        if config.has_objective:
            triples = stages.build_triples_of_chosen(chosen, team.opponents)
            stages.score(triples, team.main_players, t)
            history.append(stages.train(history[-1], triples, team, t))
        else:
            history.append(stages.train_by_sft(history[-1], t, chosen))
        stages.evaluate(history[-1])
        if not stages.report(t):  # worse than θ_0, and evaluate.stop_when_worse
            break
    return history[-1]
