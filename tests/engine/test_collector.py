"""Python's garbage collector: out of the way of imports, at work in a command."""

import subprocess
import sys

CODE = """
import gc, weakref
usual = gc.get_threshold()
import engine
assert gc.get_threshold()[0] > usual[0]
engine.imports_are_done()
assert gc.isenabled() and gc.get_threshold() == usual and gc.get_freeze_count() > 0
class Node: pass
node = Node()
node.itself = node
alive = weakref.ref(node)
del node
for _ in range(50):
    objects = [[] for _ in range(1000)]
assert alive() is None, "a cycle made by a command stays"
"""


def test_a_command_collects_its_own_cycles():
    subprocess.run([sys.executable, "-c", CODE], check=True)
