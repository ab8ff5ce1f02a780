"""The operator: GroundingTrainJob and GroundingEvalJob on a Kubernetes cluster.

The operator is level-triggered: a watch only queues a job's key; a worker observes the job and everything it owns, calls the pure `plan`,
and acts. All state of a job is in its status and in the objects it owns, so the operator may be killed between any two writes.
"""
