"""Training of what LTX-2 was pre-trained to be: autoencoders, vocoder, bidirectional teacher.

At pocket size only: the 19B model comes with all of them.
"""
