"""Runs untrusted Python programs: a fork server that a scoring process owns, each program a confined fork of it.

Nothing in here imports another part of areal, and modules import each other relatively: the fork server loads this folder as a
package of its own, so that neither areal nor its dependencies are in the programs' memory.
"""
