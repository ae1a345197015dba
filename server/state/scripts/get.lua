-- Reads one entry: "VERSION JSON", or nothing.
return redis.call('HGET', values, ARGV[2])
