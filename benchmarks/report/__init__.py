"""The stored rows as a page, pictures and tables: `tvk report`."""
