"""What ``hagroup.toml`` says: read, checked, written; PIN sources; and how our commands log.

``model`` holds the values, ``load`` reads and checks them, ``write`` renders them, ``pins`` reads the PINs they
point to. Importers name the module they mean (``hagroup.config.load.load``); nothing is re-exported here.
"""
