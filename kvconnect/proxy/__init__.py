"""The prefill/decode proxy.

One request, from its client to its answer:

- ``app`` talks to clients (``http``: keys and errors), ``legs`` asks engines;
- ``policy`` says what is asked, without any I/O; ``tokenized`` and ``conversations`` what goes with
  it: token ids that prefill made, what decode lends of a chat; ``early`` who is asked meanwhile;
- ``session`` keeps connections to engines, ``exchange`` is one of them;
- ``life`` remembers what became of it, ``counters`` of all of them; ``metrics``, ``traces`` and
  ``ui`` tell others; ``keepers`` remembers which engine made a response.

Which engines, and when:

- ``pool`` knows those of a role, in ``balance``'s order; ``discovery`` and ``admin`` put them
  there, ``health`` looks whether they live; ``budget`` limits what is asked again;
- ``admission`` lets requests wait until there is room;
- ``placement`` says where a prompt belongs, by what engines hold (``holdings``) and by how long
  they take (``short``). ``prompts`` is a prompt's text, ``prompt_tokens`` its tokens; ``kv_events``
  what an engine says that it holds, ``kv_subscriber`` the sockets on which it does.

``config`` is what an operator may set.
"""
