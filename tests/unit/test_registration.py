"""What is said to one who registers a method or a start, and makes a mistake."""

import pytest

from admin_fairseq import AdminError, Rule, register_method, register_start
from admin_fairseq.omega import CLOSED_FORMS, closed_form, depends_on_depth


def test_a_start_of_a_name_that_is_taken():
    before = dict(CLOSED_FORMS)
    for name in ("profile", "logn"):
        with pytest.raises(AdminError, match=f'@register_start."{name}".: there is such a start already'):
            register_start(name)(lambda i, n: 2.0)
    assert before == CLOSED_FORMS


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_start_that_is_no_omega(value, monkeypatch, build):
    monkeypatch.setitem(CLOSED_FORMS, "bad", lambda i, n: value if i == 3 else 1.0)
    with pytest.raises(AdminError, match=r"--admin-init bad gives omega \S+ for sub-layer 3 of 6"):
        build("transformer_admin", "--admin-init", "bad")


def test_forms_see_sub_layer_and_depth(monkeypatch):
    monkeypatch.setitem(CLOSED_FORMS, "both", lambda i, n: 10.0 * i + n)
    assert closed_form("both", 4) == [1.0, 24.0, 34.0, 44.0]
    assert [depends_on_depth(CLOSED_FORMS[name]) for name in ("both", "logn", "sqrt", "unit")] == [1, 1, 1, 0]


def test_a_method_needs_a_name_of_its_own_and_a_rule():
    with pytest.raises(AdminError, match=r'write @register_method\("name"\)'):

        @register_method
        class Bare(Rule):
            pass

    with pytest.raises(AdminError, match="there is such a method already"):
        register_method("deepnorm")
    for other in (object, lambda: None):
        with pytest.raises(AdminError, match="must be a class derived from Rule"):
            register_method("other")(other)
