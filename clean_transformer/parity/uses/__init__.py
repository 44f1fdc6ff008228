"""What people do with a GPT-2, each judged for itself: read, read long texts, generate, pad, …"""
