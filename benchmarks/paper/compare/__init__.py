"""Folders of runs on one page: does choosing blocks by conflict beat chance, and the method plain adapters?"""
