"""Does TADrop help? Models trained here on real data, merged by every rule, with controls; see docs/results.md."""
