"""Study → arms → stage graph → Ray Tune → report. Importing it loads neither torch nor ray."""
