"""Schedules of all kinds to test with, and a graph of who waits for whom."""

import graphlib
import itertools
import random

from hypothesis import settings
from hypothesis import strategies as st

from labpkg.planning.actions import Action, Schedule
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble

P_ = st.integers(1, 8)
M_ = st.integers(1, 24)
V_ = st.integers(1, 4)


def few(examples):
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None
    )


def data_inputs(action, kinds, num_stages):
    """Return the actions whose results one action uses; `kinds` knows who splits."""
    stage, kind, m = action
    if kind == "W":
        return [(stage, "I", m)]
    if kind == "F":
        return [(stage - 1, "F", m)] if stage else []
    after = [(stage + 1, kinds[stage + 1, m][1], m)] if stage + 1 < num_stages else []
    return [(stage, "F", m), *after]


def graph_of(ranks):
    """Return what each action waits for: the one before on its rank, and its inputs."""
    actions = [action for own in ranks for action in own]
    kinds = {}
    for stage, kind, m in sorted(actions, key=lambda a: "FBIW".index(a[1])):
        kinds.setdefault((stage, m), []).append(kind)
    num_stages = 1 + max(action[0] for action in actions)
    graph = {action: data_inputs(action, kinds, num_stages) for action in actions}
    for own in ranks:
        for before, action in itertools.pairwise(own):
            graph[action].append(before)
    return graph


def random_ranks(rng, *, num_stages, num_micro_batches, one_each=False, split=0.5):
    """Return a valid schedule: any placement, any order that the inputs allow."""
    S, M = num_stages, num_micro_batches
    P = S if one_each else rng.randint(1, S)
    places = [*range(P), *(rng.randrange(P) for _ in range(S - P))]
    rng.shuffle(places)
    kinds = {
        (s, m): "FIW" if rng.random() < split else "FB"
        for s in range(S)
        for m in range(M)
    }
    graph = graphlib.TopologicalSorter(
        {
            (s, k, m): data_inputs((s, k, m), kinds, S)
            for (s, m), found in kinds.items()
            for k in found
        }
    )
    graph.prepare()
    ranks, ready = [[] for _ in range(P)], list(graph.get_ready())
    while ready:
        action = ready.pop(rng.randrange(len(ready)))
        ranks[places[action[0]]].append(Action(*action))
        graph.done(action)
        ready += graph.get_ready()
    return ranks


randoms = st.integers(0, 2**32).map(random.Random)
user_made = st.builds(
    lambda rng, S, M: Schedule(random_ranks(rng, num_stages=S, num_micro_batches=M)),
    randoms,
    st.integers(1, 6),
    st.integers(1, 6),
)
made = st.one_of(
    st.builds(gpipe, P_, M_),
    st.builds(one_f_one_b, P_, M_),
    st.builds(lambda P, M, v: interleaved(P, M, num_virtual_stages=v), P_, M_, V_),
    st.builds(
        lambda P, M, variant: zero_bubble(P, M, variant=variant),
        P_,
        M_,
        st.sampled_from(["h1", "v"]),
    ),
    user_made,
)
