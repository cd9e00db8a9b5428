"""paci"""
