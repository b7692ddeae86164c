"""Clusters: started on this machine, checked before they are used, and sent jobs."""
