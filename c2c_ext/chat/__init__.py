"""Chatting with a receiver, a sharer and a fuser: `c2c chat` in a terminal, `c2c web` in a browser.

The conversation (session.py) knows no user interface; terminal.py and web.py show it.
"""
