"""Files in, files out: rows, records, and the engines that answer them.

Knows one or several engines, a server's process and Ray; not terminals or exit codes.
"""

RESTARTS = 3
"""How often a job starts an engine again after one died, unless the user gives another number."""
