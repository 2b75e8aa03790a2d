"""`/ui`: one page that shows what the proxy and its engines do, for whoever has the admin key.

``view`` is what is shown of requests and engines, ``engines`` reads engines' ``/metrics``,
``server`` sends both to ``page.html``, which draws it.
"""
