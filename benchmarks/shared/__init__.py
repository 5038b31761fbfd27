"""What measurements, experiments and the demo share: members, systems, workloads and reports."""
