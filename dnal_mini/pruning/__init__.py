"""From hard gates to a smaller network, exactly.

One example, five channels through a residual sum. A stem makes them, a branch adds to them, a
head reads the sum. Channel 1 is closed in the stem and 1, 3 in the branch:

    stem    a0  0   a2  a3  a4        gates of the stem:   1 0 1 1 1
    branch  b0  0   b2  0   b4        gates of the branch: 1 0 1 0 1
    sum     a0+b0  0  a2+b2  a3  a4+b4

* ``analysis`` sees that channel 1 of the sum is zero plus zero: zero, so nobody needs it, and it
  goes everywhere. Channel 3 of the branch is zero, but of the sum it is a3: the stem keeps it.
* ``keepsets`` asks which of the dead channels must stay for the sake of others. The branch may keep
  its own three channels if they are put into their places of the sum ("scatter"), or all four of
  the sum's ("tie": a dead one stays).
* ``surgery`` makes the stem four filters wide, the branch three with a ``ChannelMap`` behind that
  puts them at 0, 1, 3 of four and a zero at 2, and lets the head read four channels.

>>> import torch
>>> from torch import nn
>>> from dnal_mini.gating import add_gates, gates, set_gates
>>> from dnal_mini.pruning.pruner import prune
>>> class Residual(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.stem = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
...         self.branch = nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5))
...         self.head = nn.Conv2d(5, 2, 1)
...     def forward(self, x):
...         x = self.stem(x)
...         return self.head(x + self.branch(x))
>>> net = add_gates(Residual().eval())
>>> for gate, is_open in zip(gates(net).values(), ([1, 0, 1, 1, 1], [1, 0, 1, 0, 1])):
...     gate.s.data = 2.0 * torch.tensor(is_open) - 1
>>> set_gates(net, mode="hard")
>>> small = prune(net, image_shape=(3, 7, 9))
>>> small.module.stem[0].out_channels, small.module.branch[0].out_channels
(4, 3)
>>> small.module.branch[1].scatter.source.tolist(), small.module.head.in_channels
([0, 1, -1, 2], 4)
>>> prune(net, (3, 7, 9), residual="tie").module.branch[0].out_channels
4
"""
