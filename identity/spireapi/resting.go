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
func (s *Server) RestingOn(keyID string) []string {
	now := s.cfg.Now().Unix()
	var out []string
	for _, a := range s.reg.allAgents() {
		s.mu.Lock()
		workload := s.seen[a.ID].signedBy
		s.mu.Unlock()
		switch {
		case a.Banned, a.Expires <= now && a.NewExpires <= now:
		case a.Authority == "", a.Authority == keyID, workload == keyID:
			out = append(out, a.ID)
		}
	}
	return out
}
