// Package balance picks the endpoint of each request, and knows from the data path which endpoints are well.
//
//	proxy.Table ─► Update ─► Balancer ─► Pick ─► hop ─► Done ─► health ─► levels
//	                             │
//	                             └─► Report (LRS, drills), Explain, metrics
//
// Levels share the traffic by Envoy's arithmetic: overprovisioning 1.4, gradual spill, and panic only where all levels
// together are below 100 %. Within a level it is least request of two, round robin or a hash ring, and localities by weight.
//
// Health belongs to (xDS cluster, endpoint ID). A gateway's is its own: a gateway that cannot be reached is charged, not the endpoints
// behind it, and an endpoint's failure never charges its gateway. There are two kinds of bad:
//
//   - dead: no connection, a lost connection, or streams refused. It is a fact, so one is enough, no limit applies, and even panic
//     avoids it. After a backoff of 1 s (doubling to 10 s) Config.Probe tries again, or without that one request. Who refuses streams, as a
//     draining workload does, is always tried by a request. Once one has died, its neighbours are probed at once: in a black hole
//     nobody has noticed where no request is open.
//   - ejected: consecutive answers 502, 503, 504 or UNAVAILABLE, resets and timeouts. It is a judgement, so it follows Envoy's
//     outlier detection: for base × n, within a percentage of the level unless a lower level has healthy endpoints.
//
// Before that there is doubt: a PING on an endpoint's connection is not answered as soon as usual. Who is in doubt is passed over while there are
// others, and counts as well in all arithmetic, so that one slow endpoint moves nobody's traffic but its own. At the first doubt a few endpoints of
// each place are asked by Config.Probe: by the time that a call which waits for the silent one is given up, it is known who else is silent. Its retry
// (PickInfo.Silent) goes to the nearest who has answered, or else away from each place where somebody is in doubt, and so meets no second black hole.
//
// What comes back takes its share over a ramp (10 s), as long as others can carry the rest.
//
// Pick and Done take no lock on the way of a healthy request: they read one immutable state per xDS cluster. There are no timers: what
// is due by the clock is worked out by the next Pick, Explain or Report. Only Run, which probes and logs, has goroutines.
package balance
