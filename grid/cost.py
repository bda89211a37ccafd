class Estimator:
    def __init__(self, graph, profile): pass
    def fill(self, stage): pass
def totals(*a): return {}
