"""`aria-train plan`: what a configuration asks of a cluster, before one is booked.

layout.py         parameters, what is sharded as one, how much of it a rank holds
communication.py  collectives of a step: calls and bytes
trace.py          activations, found by running the model's own code on tensors without data
memory.py         bytes per rank by part, at the moment when most is held
speed.py          FLOPs per token, tokens per second, days
advice.py         layouts that fit
report.py         all of it as text or JSON
"""
