"""Mining as its definition says it, with plain Python over a list: what the pipeline is compared with."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import blake2b

from muser_dist.interactions.log import LogLayout
from muser_dist.interactions.mining import MiningConfig
from muser_dist.interactions.split import SPLITS, SplitConfig

MASK = 2**64 - 1


def hash_of(name):
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def mixed(x, key):
    x ^= key
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def drawn(name, kind, val, test, seed):
    u = mixed(hash_of(name), hash_of(f"{seed} {kind}")) / 2**64
    return 2 if u < test else 1 if u < test + val else 0


def level_of(split, user, item, time):
    levels = [
        drawn(user, "user", split.val_users, split.test_users, split.seed),
        drawn(item, "item", split.val_items, split.test_items, split.seed),
    ]
    if split.val_from and time >= int(split.val_from):
        levels.append(1)
    if split.test_from and time >= int(split.test_from):
        levels.append(2)
    return max(levels)


@dataclass
class Found:
    pairs: dict  # (split, trigger, item) -> (support, weight)
    left_out: Counter
    used: Counter


def number(cell):
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def mine(
    rows: list[tuple],
    layout: LogLayout,
    config: MiningConfig,
    split: SplitConfig,
    latest: int | None = None,
    known: set[str] | None = None,
) -> Found:
    """Rows are (user, item, time or position, signal, value), cells as text, None or "" where missing."""
    left_out: Counter = Counter()
    histories = defaultdict(dict)
    for user, item, time, signal, value in rows:
        signal = signal or layout.signal
        when = number(time)
        reason = None
        if not user:
            reason = "missing user"
        elif not item:
            reason = "missing item"
        elif layout.ordered and not time:
            reason = "missing time or position"
        elif layout.ordered and when is None:
            reason = "unreadable time or position"
        elif layout.time and when < 631152000:
            reason = "time before 1990"
        elif layout.time and latest is not None and when > latest:
            reason = "time in the future"
        elif layout.ordered and when < 0:
            reason = "negative time or position"
        elif value and number(value) is None:
            reason = "unreadable value"
        elif known is not None and item not in known:
            reason = "unknown item"
        else:
            trigger = config.rule == "explicit" and signal in config.triggers
            preference = signal in config.signals
            minimum = config.min_value.get(signal)
            enough = minimum is None or (bool(value) and number(value) >= minimum)
            if not trigger and not preference:
                reason = "signal not used"
            elif not trigger and not enough:
                reason = "value below the minimum"
        if reason:
            left_out[reason] += 1
            continue
        if layout.ordered:
            order = int(when)
        else:
            order = mixed(hash_of(user) ^ mixed(hash_of(item), split.seed), split.seed) >> 1
        key = (order, hash_of(item), signal, item)
        roles = histories[user].setdefault(key, set())
        if roles:
            left_out["exact repeat"] += 1
        roles |= ({"trigger"} if trigger else set()) | ({"preference"} if preference and enough else set())

    used: Counter = Counter()
    pairs: dict = {}
    levels = [0]
    levels += [1] if split.val_users or split.val_items or split.val_from else []
    levels += [2] if split.test_users or split.test_items or split.test_from else []
    for now in levels:
        who = defaultdict(set)  # users of a pair
        triggers, preferences = defaultdict(set), defaultdict(set)  # users of an item
        for user, history in histories.items():
            events = [
                (order, item, roles, level_of(split, user, item, order))
                for (order, _, _, item), roles in sorted(history.items(), key=lambda entry: entry[0][:3])
            ]
            events = [event for event in events if event[3] <= now]
            beyond = events[: -config.max_events]
            events = events[-config.max_events :]
            left_out["beyond max_events"] += sum(event[3] == now for event in beyond)
            used[SPLITS[now]] += sum(event[3] == now for event in events)
            for _, item, roles, _ in events:
                if "preference" in roles:
                    preferences[item].add(user)
                if "trigger" in roles:
                    triggers[item].add(user)
            for j, (later, b, roles_b, level_b) in enumerate(events):
                for earlier, a, roles_a, level_a in events[max(j - config.partners, 0) : j]:
                    if a == b or max(level_a, level_b) != now:
                        continue
                    if layout.ordered and later - earlier > config.window:
                        continue
                    if config.rule == "cooccurrence":
                        who[a, b].add(user)
                        who[b, a].add(user)
                    elif later > earlier and "trigger" in roles_a and "preference" in roles_b:
                        who[a, b].add(user)
        triggers = triggers if config.rule == "explicit" else preferences
        by_trigger = defaultdict(list)
        for (a, b), users in who.items():
            if len(users) >= (config.min_support if now == 0 else 1):
                weight = len(users) / float(len(triggers[a]) * len(preferences[b])) ** config.popularity
                by_trigger[a].append((-weight, -len(users), hash_of(b), b))
        for a, candidates in by_trigger.items():
            for weight, support, _, b in sorted(candidates)[: config.per_trigger]:
                pairs[SPLITS[now], a, b] = (-support, -weight)
    return Found(pairs, +left_out, +used)
