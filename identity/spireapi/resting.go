package spireapi

import "crypto/x509"

// noteSigned remembers which root signed the newest X509-SVID that an agent got for a workload.
func (s *Server) noteSigned(agentID string, chain []*x509.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	act := s.seen[agentID]
	act.signedBy = authorityOf(chain[0])
	s.seen[agentID] = act
}

// RestingOn names the agents of which their own SVID, or the newest that they got for a workload, was signed by the root with
// that key ID: they are shut out when it is revoked, and those that came by a token for good. An agent that has renewed and not
// yet shown its new SVID is among them, since that answer may be lost, and so is one of which it is not known.
func (s *Server) RestingOn(keyID string) []string { return s.restingOn(keyID, false) }

// RestingHere is RestingOn where there are several replicas. An agent that has moved to another one gets what its workloads need there, so
// of that this replica knows only while it hears of the agent; all replicas know what the agents' own SVIDs rest on.
func (s *Server) RestingHere(keyID string) []string { return s.restingOn(keyID, true) }

func (s *Server) restingOn(keyID string, heard bool) []string {
	now := s.cfg.Now()
	var out []string
	for _, a := range s.reg.allAgents() {
		s.mu.Lock()
		act := s.seen[a.ID]
		if heard && s.followed[a.ID] == nil && now.Sub(act.at) > heardOf {
			act.signedBy = ""
		}
		s.mu.Unlock()
		switch {
		case a.Banned, a.Expires <= now.Unix() && a.NewExpires <= now.Unix():
		case a.Authority == "", a.Authority == keyID, act.signedBy == keyID:
			out = append(out, a.ID)
		}
	}
	return out
}
