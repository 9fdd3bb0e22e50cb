"""One file a method: how it chooses which channels stay. ``METHODS`` is the table of them."""

from dnal_mini.methods.contract import Method
from dnal_mini.methods.controls import L1Norm, Random, Uniform
from dnal_mini.methods.dnal import DNAL
from dnal_mini.methods.group_lasso import GroupLasso
from dnal_mini.methods.slimming import Slimming

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (DNAL, Random, Uniform, L1Norm, Slimming, GroupLasso)
}
