"""`make faults`: everything that goes wrong in a long run, done to a small one, and what each cost.

inject.py     one rank's life with a fault in it
scenarios.py  the faults, one function each
kills.py      a hundred SIGKILLs at random moments
run.py        runs all of them and writes docs/reliability.md
"""
