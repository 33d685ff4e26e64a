"""How arrays lie on a mesh of devices: the rules from logical axes to mesh axes, and meshes."""

from xquant_jax.sharding.rules import *  # noqa: F403
