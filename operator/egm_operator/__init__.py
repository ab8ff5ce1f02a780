"""The operator: GroundingTrainJob and GroundingEvalJob on a Kubernetes cluster.

Level-triggered: a watch only wakes a job's key; a worker observes the job and everything it owns, asks the pure `plan`, and acts. What is known
of a job is in its status and in the objects it owns, so that the operator may be killed between any two writes.
"""
