"""`tvk profile`: where the time of a method goes."""
