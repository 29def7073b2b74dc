-- One index for "the answer under this claim" and for "all answers of this run". Answers without a
-- token do not collide in it: each null is different from all others.
drop index answers_by_run;
drop index answers_by_token;
create unique index answers_by_token on answers (run, token);
