"""Long measurements that a notebook starts and reads."""
