"""Looking at runs afterwards: what they left in their folders, in pictures and words.

Nothing of this is imported by training. Pictures need matplotlib, `pip install ngplugin[report]`.
"""
