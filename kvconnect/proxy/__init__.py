"""The prefill/decode proxy. Imports go down only: the lower stands first.

- ``policy`` says what engines are asked, without any I/O.
- ``engines``: ``pool`` knows those of a role, in ``balance``'s order; ``discovery`` puts them
  there, ``health`` looks whether they live; ``session`` keeps connections to them, ``exchange`` is
  one of these; ``keepers`` remembers which engine made a response.
- ``prompts``: ``placement`` says where a prompt belongs, by what engines hold (``holdings``) and by
  how long they take (``short``). ``text`` is a prompt's text, ``tokens`` are its tokens;
  ``kv_events`` what an engine says that it holds, ``kv_subscriber`` the sockets on which it does.
- ``config`` is what an operator may set, ``http`` keys and errors.
- ``requests``: ``admission`` lets one wait until there is room, ``legs`` asks engines, ``early``
  knows who is asked at once; ``tokenized`` and ``conversations`` are what goes with it: token ids
  that prefill made, what decode lends of a chat. ``budget`` limits what is asked again; ``life``
  remembers what became of one, ``counters`` of all of them.
- ``operators``: ``admin`` puts engines in and takes them out, ``metrics`` and ``traces`` tell
  others; ``ui`` is the page.
- ``app`` talks to clients.
"""
