"""Looking at runs afterwards: what they left in their folders, in pictures and words.

Training imports this only when it has ended, to draw for loggers. Pictures need matplotlib,
`pip install ngplugin[report]`.
"""
