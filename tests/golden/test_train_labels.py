"""Named differences from releases' training labels."""

from tests.golden import comparison
from tests.golden.conftest import DATA
from tests.golden.systems import SYSTEMS, train_label_rules, train_labels


def test_every_rule_is_needed():
    folders = [
        folder for folder in comparison.find(DATA) if SYSTEMS.get(comparison.read(folder).system) is train_labels
    ]
    needed = set().union(*map(train_labels.differing, folders))
    assert [rule for rule in train_label_rules.RULES if rule not in needed] == []
    assert all(rule.reason.strip() for rule in train_label_rules.RULES)
