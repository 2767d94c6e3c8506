"""Whether joint training was only tuned too little: what is run to find out, and the report on it."""
