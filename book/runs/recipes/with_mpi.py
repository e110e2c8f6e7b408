"""MPI as the launcher: mpirun -n 4 python with_mpi.py.

MPI numbers the processes and carries one message, the address of rank 0. Gradients go
through torch.distributed, as always.
"""

import os
import socket

from job import train
from mpi4py import MPI

ranks = MPI.COMM_WORLD
neighbours = ranks.Split_type(MPI.COMM_TYPE_SHARED)  # those of the same machine
with socket.create_server(("", 0)) as free:
    mine = socket.gethostname(), free.getsockname()[1]
host, port = ranks.bcast(mine, root=0)
os.environ |= {
    "RANK": str(ranks.rank),
    "WORLD_SIZE": str(ranks.size),
    "LOCAL_RANK": str(neighbours.rank),
    "LOCAL_WORLD_SIZE": str(neighbours.size),
    "MASTER_ADDR": host,
    "MASTER_PORT": str(port),
}
result = train()
if ranks.rank == 0:
    print(result)
