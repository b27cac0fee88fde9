"""Reports: records to leaderboards and figures."""
